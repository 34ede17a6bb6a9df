"""The scripts that start a run, with stand-ins for deepspeed, srun, scancel and scontrol on the PATH.

Asserted are the exact command lines, what an exit code leads to, and that SIGTERM reaches the training processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import letters_set

from dso.decisions.decision import DecisionSet

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch" / "cluster"
NODE, HOSTS, SLURM = LAUNCH / "node.sh", LAUNCH / "hosts.sh", LAUNCH / "slurm" / "train.slurm"
ZERO2 = str(ROOT / "configs" / "deepspeed" / "zero2.json")
MODULE = ("--no_local_rank", "--module", "launch.train")  # each process knows its rank from LOCAL_RANK
PATIENCE = 120

RECORD = '{ printf "%s" "${0##*/}"; printf "|%s" "$@"; printf "\\n"; } >>"$LOG"\n'
# A launcher as deepspeed is one: it starts a process that starts the training processes, and hands their code on.
TREE = """
rank() { trap 'echo saved >>"$LOG"; exit 75' TERM; echo up >>"$LOG"; while :; do sleep 0.05; done; }
starter() {
  rank & first=$!
  rank & second=$!
  wait $first; code=$?
  wait $second
  exit $code
}
starter & wait $!
"""
# One task of a job, as srun would start it; srun's own options come before the program.
TASK = """
while [[ $1 == -* ]]; do shift; done
SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=16 "$@" || exit
exit "${CODE:-0}"
"""
# A step that runs until it is told to stop, then has saved everything.
STEP = """
trap 'echo terminated >>"$LOG"; exit 143' TERM
echo up >>"$LOG"
until [ -e "$LOG.told" ]; do sleep 0.05; done
exit "${CODE:-75}"
"""
SCONTROL = """
case $1 in
  show) printf 'node-a\\nnode-b\\n' ;;
  requeue) exit "${REQUEUE:-0}" ;;
esac
"""


class Machine:
    """A folder of stand-ins in front of the PATH, and what they were called with."""

    def __init__(self, folder: Path):
        self.bin, self.log = folder / "bin", folder / "log"
        self.bin.mkdir()
        self.log.touch()
        self.env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "LOG": str(self.log)}
        for name in [name for name in self.env if name.startswith("SLURM_")]:
            del self.env[name]

    def program(self, name: str, body: str = "") -> None:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{RECORD}{body}", encoding="utf-8")
        path.chmod(0o755)

    def slurm(self, srun: str = TASK) -> None:
        """The programs and variables of a job on two nodes."""
        self.env |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_PER_TASK": "6"}
        self.env["PYTHON"] = "py"
        self.program("srun", srun)
        self.program("scontrol", SCONTROL)
        self.program("scancel", 'touch "$LOG.told"')
        known = 'echo "rank|$RANK|$LOCAL_RANK|$WORLD_SIZE|$PYTHONSAFEPATH" >>"$LOG"'
        self.program("py", f"case $* in *FOLDER*) echo /site/configs ;; *) {known} ;; esac")

    def calls(self) -> list[list[str]]:
        return [line.split("|") for line in self.log.read_text(encoding="utf-8").splitlines()]

    def calls_of(self, name: str) -> list[list[str]]:
        return [call[1:] for call in self.calls() if call[0] == name]

    def run(self, script: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(script), *arguments]
        return subprocess.run(command, cwd=cwd, env=self.env, capture_output=True, text=True, timeout=PATIENCE)

    def start(self, script: Path, *arguments: str) -> subprocess.Popen[str]:
        """A process in a session of its own that hears Ctrl-C, also where the tests do not (`make test &`): a shell
        cannot trap what it was started ignoring."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [str(script), *arguments],
            env=self.env,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for(self, word: str, times: int = 1) -> None:
        end = time.monotonic() + PATIENCE
        while self.log.read_text(encoding="utf-8").split().count(word) < times:
            assert time.monotonic() < end, self.log.read_text(encoding="utf-8")
            time.sleep(0.02)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_every_script_is_valid_bash_and_stops_at_errors() -> None:
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*")]
    assert {script.name for script in scripts} >= {"common.sh", "node.sh", "hosts.sh", "train.slurm"}
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, ""), script
        if script.name != "common.sh":  # which is sourced
            text = script.read_text(encoding="utf-8")
            assert text.startswith("#!/usr/bin/env bash\n#") and "\nset -euo pipefail\n" in text, script
            assert os.access(script, os.X_OK), script


# One node


def test_a_node_runs_deepspeed_with_the_config_and_hands_the_rest_to_training(machine: Machine) -> None:
    machine.program("deepspeed")
    done = machine.run(NODE, "mine.yaml", "--gpus", "4", "run.run_name=a b", "--port", "29511", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    command = ["--num_gpus", "4", "--master_port", "29511", *MODULE, "mine.yaml"]
    assert machine.calls_of("deepspeed") == [[*command, "--deepspeed", ZERO2, "run.run_name=a b", "--resume", "auto"]]
    assert done.stdout == f"+ deepspeed {' '.join(command)} --deepspeed {ZERO2} run.run_name=a\\ b --resume auto\n"


def test_a_node_uses_all_accelerators_and_the_deepspeed_file_it_is_given(machine: Machine) -> None:
    machine.program("deepspeed", 'echo "safe|$PYTHONSAFEPATH" >>"$LOG"')
    assert machine.run(NODE, "mine", "--deepspeed", "own.json", cwd=machine.bin).returncode == 0
    command = ["--master_port", "29500", *MODULE, "mine", "--deepspeed", "own.json"]
    assert machine.calls_of("deepspeed") == [command]
    assert machine.calls_of("safe") == [["1"]]  # a folder `launch` where it is started does not stand for ours


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_a_nodes_exit_code_is_the_runs(machine: Machine, code: int) -> None:
    machine.program("deepspeed", f"exit {code}")
    assert machine.run(NODE, "mine").returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_that_is_stopped_tells_the_training_processes_and_waits_for_them(
    machine: Machine, number: signal.Signals
) -> None:
    machine.program("deepspeed", TREE)
    process = machine.start(NODE, "mine")
    machine.wait_for("up", 2)
    os.killpg(process.pid, number)  # as a terminal sends Ctrl-C: to the whole group
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, err
    assert machine.log.read_text(encoding="utf-8").split().count("saved") == 2


def test_a_second_ctrl_c_kills_what_does_not_end(machine: Machine) -> None:
    machine.program("deepspeed", TREE.replace("exit 75", ":"))
    process = machine.start(NODE, "mine")
    machine.wait_for("up", 2)
    os.killpg(process.pid, signal.SIGINT)
    machine.wait_for("saved", 2)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGKILL


# Several nodes


def test_hosts_run_deepspeed_over_the_hostfile(machine: Machine, tmp_path: Path) -> None:
    machine.program("deepspeed", "exit 3")
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\nworker-1 slots=8\n\nworker-2 slots=4  # smaller", encoding="utf-8")
    done = machine.run(HOSTS, str(hosts), "mine", "train.max_steps=5", "--resume", "auto")
    assert done.returncode == 3
    command = ["--hostfile", str(hosts), "--force_multi", "--master_port", "29500", *MODULE]
    rest = ["mine", "--deepspeed", ZERO2, "train.max_steps=5", "--resume", "auto"]
    assert machine.calls_of("deepspeed") == [[*command, *rest]]
    assert done.stdout.splitlines()[0] == "2 machines, 12 processes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker-1\n", ":1: expected 'name slots=N', found 'worker-1'"),
        ("a slots=1\nb slots=zero\n", ":2: expected 'name slots=N', found 'b slots=zero'"),
        ("a slots=1 b slots=2\n", ":1: expected 'name slots=N', found 'a slots=1 b slots=2'"),
        ("a slots=1\na slots=2\n", ":2: a is there twice"),
        ("# nobody\n", ": names no machine, as in: worker-1 slots=8"),
    ],
)
def test_a_bad_hostfile_is_refused(machine: Machine, tmp_path: Path, text: str, message: str) -> None:
    machine.program("deepspeed")
    hosts = tmp_path / "hosts"
    hosts.write_text(text, encoding="utf-8")
    done = machine.run(HOSTS, str(hosts), "mine")
    assert (done.returncode, done.stderr) == (2, f"hosts.sh: {hosts}{message}\n")
    assert not machine.calls()


# Slurm


def test_slurm_starts_one_process_a_task_that_knows_its_rank(machine: Machine) -> None:
    machine.slurm()
    done = machine.run(SLURM, "mine", "--deepspeed", "z3.json", "run.run_name=a b", cwd=machine.bin)
    assert done.returncode == 0, done.stderr
    (srun,) = machine.calls_of("srun")
    assert srun[:4] == ["--kill-on-bad-exit=0", "--wait=90", "bash", "-c"]
    train = ["-u", "-m", "launch.train", "mine", "--deepspeed", "z3.json", "--resume", "auto"]
    assert srun[5:] == ["rank", "py", *train, "run.run_name=a b"]
    assert machine.calls_of("py") == [[*train, "run.run_name=a b"]]
    assert machine.calls_of("rank") == [
        ["5", "1", "16", "1"]
    ]  # and it does not look for modules where the job was submitted
    assert "MASTER_ADDR=node-a MASTER_PORT=24711\n" in done.stdout


def test_slurm_asks_the_package_where_its_configs_are(machine: Machine) -> None:
    machine.slurm()
    assert machine.run(SLURM, "mine").returncode == 0
    assert "/site/configs/deepspeed/zero2.json" in machine.calls_of("srun")[0]


@pytest.mark.parametrize("code", [75, 0, 1, 2, 137, 143])
def test_a_job_is_requeued_only_when_it_was_preempted(machine: Machine, code: int) -> None:
    requeued = code == 75
    machine.slurm()
    machine.env["CODE"] = str(code)
    done = machine.run(SLURM, "mine")
    assert (["requeue", "4711"] in machine.calls_of("scontrol")) == requeued
    assert done.returncode == (0 if requeued else code)


def test_restarts_are_bounded(machine: Machine) -> None:
    machine.slurm()
    machine.env |= {"CODE": "75", "MAX_RESTARTS": "3", "SLURM_RESTART_COUNT": "2"}
    assert "restart 3\n" in machine.run(SLURM, "mine").stdout
    machine.env["SLURM_RESTART_COUNT"] = "3"
    done = machine.run(SLURM, "mine")
    assert done.returncode == 75 and "restarted 3 times already; submit it again to go on" in done.stdout
    assert machine.calls_of("scontrol").count(["requeue", "4711"]) == 1


def test_a_job_that_cannot_be_requeued_says_so(machine: Machine) -> None:
    machine.slurm()
    machine.env |= {"CODE": "75", "REQUEUE": "1"}
    done = machine.run(SLURM, "mine")
    assert done.returncode == 75 and "not requeued; submit it again to go on" in done.stderr


@pytest.mark.parametrize("code", [75, 143])  # 143: before there was anything to save
def test_sigterm_is_passed_on_to_the_steps_and_the_job_requeued(machine: Machine, code: int) -> None:
    machine.slurm(STEP)
    machine.env["CODE"] = str(code)
    process = machine.start(SLURM, "mine")
    machine.wait_for("up")
    process.send_signal(signal.SIGTERM)  # to the batch script alone, as --signal=B:TERM@120 does
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert machine.calls_of("scancel") == [["--signal=TERM", "4711"]]  # srun itself would kill the tasks
    assert ["terminated"] not in machine.calls()
    assert machine.calls_of("scontrol")[-1] == ["requeue", "4711"]


def test_a_run_that_was_done_when_sigterm_came_is_not_requeued(machine: Machine) -> None:
    machine.slurm(STEP)
    machine.env["CODE"] = "0"
    process = machine.start(SLURM, "mine")
    machine.wait_for("up")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert machine.calls_of("scontrol") == [["show", "hostnames", "node-[a-b]"]]


def test_without_scancel_the_step_itself_is_told(machine: Machine) -> None:
    machine.slurm(STEP)
    machine.program("scancel", "exit 1")
    process = machine.start(SLURM, "mine")
    machine.wait_for("up")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert ["terminated"] in machine.calls()
    assert process.returncode == 0 and machine.calls_of("scontrol")[-1] == ["requeue", "4711"]


def test_slurms_directives_stand_before_the_first_command() -> None:
    lines = SLURM.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(directives) < first
    given = {lines[number].split()[1] for number in directives}
    assert {"--signal=B:TERM@120", "--requeue", "--open-mode=append"} <= given
    per_node = dict(line.removeprefix("--").split("=") for line in given if "-per-node=" in line)
    assert per_node["ntasks-per-node"] == per_node["gpus-per-node"]


# The real thing

TINY = """
model: {{name: {model}, device: cpu}}
data: {{set: {data}}}
train: {{max_steps: 40, ambiguous: 16, unambiguous: 4, optimizer: {{fisher_batches: 1}}}}
evaluation: {{eval_steps: 20, scales: [0.0, 1.0]}}
run: {{output_dir: {runs}}}
"""
# srun on one node with two tasks, and its siblings, without Slurm.
TWO_TASKS = """
while [[ $1 == -* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & pids+=($!); done
echo "${pids[@]}" >"$LOG.pids"
highest=0
for pid in "${pids[@]}"; do
  code=0; wait "$pid" || code=$?
  (( code > highest )) && highest=$code
done
exit $highest
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [NODE, SLURM])
def test_a_real_run_that_is_preempted_goes_on(
    machine: Machine, tmp_path: Path, model_folder: Path, script: Path
) -> None:
    """Two processes of training, SIGTERM in the middle, and the same command again: all steps, each once."""
    data, config, runs = tmp_path / "data.jsonl", tmp_path / "tiny2.5.yaml", tmp_path / "runs"
    splits = ("train", "validation", "test")
    decisions = [replace(d, id=f"{split}/{d.id}", split=split) for split in splits for d in letters_set()]
    DecisionSet(tuple(decisions)).write_jsonl(data)
    config.write_text(TINY.format(model=model_folder, data=data, runs=runs), encoding="utf-8")
    machine.env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    machine.env["PATH"] = f"{machine.env['PATH']}:{Path(sys.executable).parent}"
    if script == SLURM:
        machine.slurm(TWO_TASKS)
        machine.program("scancel", 'kill -TERM $(cat "$LOG.pids")')
        machine.env |= {"PYTHON": sys.executable, "SLURM_JOB_NODELIST": "here"}
        machine.program("scontrol", "if [ $1 = show ]; then echo 127.0.0.1; fi")
        arguments: tuple[str, ...] = (str(config),)
    else:
        arguments = (str(config), "--gpus", "2", "--port", str(free_port()), "--resume", "auto")
    metrics = runs / "tiny2.5" / "metrics.jsonl"
    process = machine.start(script, *arguments)
    end = time.monotonic() + 10 * PATIENCE
    while not metrics.exists() or len(metrics.read_text(encoding="utf-8").splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=10 * PATIENCE)
    assert process.returncode == (75 if script == NODE else 0), out + err  # the job was requeued
    assert 5 <= len(metrics.read_text(encoding="utf-8").splitlines()) < 40
    done = subprocess.run(
        [str(script), *arguments], env=machine.env, capture_output=True, text=True, timeout=10 * PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line).get("train/n_updates") for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [step for step in steps if step is not None] == list(range(1, 41))
    assert (runs / "tiny2.5" / "steering" / "dso_model.safetensors").is_file()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# What is common to all


@pytest.mark.parametrize("script", [NODE, HOSTS, SLURM])
def test_a_dry_run_prints_the_command_and_starts_nothing(machine: Machine, tmp_path: Path, script: Path) -> None:
    machine.program("deepspeed")
    machine.slurm()
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\n", encoding="utf-8")
    first = [str(hosts)] if script == HOSTS else []
    done = machine.run(script, *first, "mine", "--dry-run", "train.max_steps=5")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\+ (deepspeed|srun) .*launch\.train mine .*train\.max_steps=5$", done.stdout, re.M)
    assert {call[0] for call in machine.calls()} <= {"py"}  # which says where the configs are


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (NODE, (), "name a config"),
        (NODE, ("--gpus", "2"), "the config comes before the options, found --gpus"),
        (NODE, ("mine", "--gpus"), "--gpus needs a value"),
        (NODE, ("mine", "--gpus", "0"), "--gpus is '0', expected a number of at least 1"),
        (NODE, ("mine", "--port", "http"), "--port is 'http', expected a number"),
        (HOSTS, (), "name a hostfile and a config"),
        (HOSTS, ("nowhere", "mine"), "nowhere: cannot be read"),
        (SLURM, (), "name a config"),
        (SLURM, ("mine", "--deepspeed"), "--deepspeed needs a file"),
        (SLURM, ("mine", "--overwrite"), "--overwrite: a job that may be requeued always goes on where it was"),
        (SLURM, ("mine",), "runs under Slurm: sbatch launch/cluster/slurm/train.slurm mine"),
    ],
)
def test_wrong_use_is_refused(machine: Machine, script: Path, arguments: tuple[str, ...], message: str) -> None:
    machine.program("deepspeed")
    machine.program("srun")
    done = machine.run(script, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{script.name}: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not machine.calls_of("deepspeed") and not machine.calls_of("srun")


def test_help_is_the_scripts_own_comment(machine: Machine) -> None:
    for script in (NODE, HOSTS):
        done = machine.run(script, "--help")
        assert (
            done.returncode == 0 and f"launch/cluster/{script.name} " in done.stdout and "set -euo" not in done.stdout
        )


def test_the_documented_commands_run(machine: Machine, tmp_path: Path) -> None:
    machine.program("deepspeed")
    machine.slurm()
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\n", encoding="utf-8")
    # as sbatch would: its own options, then the script with its arguments
    machine.program("sbatch", 'while [[ $1 == --* ]]; do shift 2; done\nbash "$@"')
    text = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if not line.startswith("dso ")]
    assert len(lines) == 5
    for line in lines:
        words = [str(hosts) if word == "HOSTFILE" else word for word in line.split()]
        done = subprocess.run(words, cwd=ROOT, env=machine.env, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert [len(machine.calls_of(name)) for name in ("deepspeed", "sbatch", "srun")] == [3, 2, 2]
    assert [call[call.index("launch.train") + 1] for call in machine.calls_of("srun")] == [
        "qwen2.5-7b-synthbias",
        "qwen2.5-vl-7b-socialcounterfactuals",
    ]


def test_deepspeed_takes_the_options_that_the_scripts_give_it(machine: Machine, tmp_path: Path) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    machine.program("deepspeed")
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\n", encoding="utf-8")
    assert machine.run(NODE, "mine", "--gpus", "2").returncode == 0
    assert machine.run(HOSTS, str(hosts), "mine").returncode == 0
    for call in machine.calls_of("deepspeed"):
        parsed = runner.parse_args(call)
        assert (parsed.module, parsed.no_local_rank, parsed.user_script) == (True, True, "launch.train")
        assert parsed.user_args == ["mine", "--deepspeed", ZERO2]
