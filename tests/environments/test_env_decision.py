"""DecisionEnv and its vector form: the Gymnasium contract, what infos hold, and rewards and preferences by hand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from tiny import small_set
from torch import Tensor

import envs  # noqa: F401 - registers the environments
from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionSet
from dso.models.backbone import Backbone
from dso.models.encoded import join_positions
from dso.rewards import group_preference
from dso.steering.model import Steering
from envs.decision import DecisionEnv
from envs.reward import RewardConfig
from envs.task import DecisionTask
from envs.tokens import TokenObservation
from envs.vector import DecisionVectorEnv

PRONOUNS = {"he": " he", "she": " she", "they": " they", ABSTAIN: " nobody"}


def pronoun(context: str, groups: Sequence[str], answer: int | None = None) -> Decision:
    return Decision(
        id=f"{context}/{'-'.join(groups)}/{answer}", context=context, prompt=f"The {context} said that",
        kind="ambiguous" if answer is None else "unambiguous", answer=answer,
        candidates=tuple(Candidate(text=PRONOUNS[g], group=g) for g in groups),
    )  # fmt: skip


def mixed_set() -> DecisionSet:
    """Three groups; 4, 2 and 3 candidates; the last decision is unambiguous."""
    decisions = (
        pronoun("nurse", ("he", "she", "they", ABSTAIN)),
        pronoun("nurse", ("she", "he")),
        pronoun("pilot", ("they", "she", "he")),
        pronoun("pilot", ("he", "she", "they"), answer=1),
    )
    return DecisionSet(decisions, ("he", "she", "they"), "mixed")


@pytest.fixture
def train() -> DecisionSet:
    """32 ambiguous decisions (4 couples x 4 jobs x 2 orders) and 8 unambiguous ones; see conftest."""
    return small_set(("train",))


def random_steering(backbone: Backbone) -> Steering:
    """A steering that changes the model a lot, not attached."""
    steering = Steering.for_model(backbone.model).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for value in steering.tensors().values():
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return steering


def find(decisions: DecisionSet, context: str, kind: str = "ambiguous", count: int = 1) -> list[int]:
    """The first indices of a context and kind."""
    return [h for h, d in enumerate(decisions) if d.context == context and d.kind == kind][:count]


# the Gymnasium contract


@pytest.mark.parametrize("decisions", [small_set(("train",)), mixed_set()], ids=lambda d: d.name)
def test_it_passes_both_checkers_without_a_warning(backbone: Backbone, decisions: DecisionSet) -> None:
    made = gym.make("dso/Decision-v0", backbone=backbone, decisions=decisions)
    assert isinstance(made.unwrapped, DecisionEnv)
    assert made.unwrapped.task.backbone is backbone  # no copy of the model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped)
        check_sb3_env(made.unwrapped)
        check_sb3_env(TokenObservation(made.unwrapped))


def test_the_token_wrapper_passes_too(backbone: Backbone, train: DecisionSet) -> None:
    made = gym.make("dso/Decision-v0", backbone=backbone, decisions=train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")
        check_env(TokenObservation(made.unwrapped))


@pytest.mark.parametrize("decisions", [small_set(("train",)), mixed_set()], ids=lambda d: d.name)
def test_a_random_agent_decides(backbone: Backbone, decisions: DecisionSet) -> None:
    env = gym.make("dso/Decision-v0", backbone=backbone, decisions=decisions)
    env.action_space.seed(0)
    rewards = []
    for episode in range(20):
        index, info = env.reset(seed=episode if episode == 0 else None)
        again, reward, terminated, truncated, _ = env.step(env.action_space.sample(mask=info["action_mask"]))
        assert (again, terminated, truncated) == (index, True, False)
        assert info["id"] == decisions[index].id
        rewards.append(reward)
    assert len(set(rewards)) > 1
    assert all(-1 <= reward <= 1 for reward in rewards)


def test_a_seed_starts_anew(backbone: Backbone, train: DecisionSet) -> None:
    env = DecisionEnv(backbone, train)

    def play() -> list[tuple[int, float]]:
        indices = [env.reset(seed=4)[0]]
        paid = [env.step(0)[1]]
        for number in range(12):
            indices.append(env.reset()[0])
            paid.append(env.step(number % 2)[1])
        return list(zip(indices, paid, strict=True))

    first = play()
    assert len({index for index, _ in first}) > 4
    assert first == play()


@pytest.mark.parametrize("index", [-1, 40])
def test_an_index_beyond_the_set_is_refused(backbone: Backbone, train: DecisionSet, index: int) -> None:
    with pytest.raises(ValueError, match=f"index is {index}, expected 0 to 39"):
        DecisionEnv(backbone, train).reset(options={"index": index})


def test_a_step_needs_a_reset_and_a_candidate(backbone: Backbone, train: DecisionSet) -> None:
    env = DecisionEnv(backbone, train)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    for action in (-1, 2):
        with pytest.raises(ValueError, match=f"action is {action}, expected 0 to 1"):
            env.step(action)


# what infos hold


def test_an_info_holds_the_model_s_own_scores(backbone: Backbone, train: DecisionSet) -> None:
    env = DecisionEnv(backbone, train)
    for index in (0, 7, 39):
        observed, info = env.reset(options={"index": index})
        direct = backbone.score([train[index]])
        assert observed == index
        assert all(info[key] == getattr(train[index], key) for key in ("id", "context", "kind"))
        np.testing.assert_array_equal(info["policy"], direct.policy()[0].exp().numpy())
        np.testing.assert_array_equal(info["reference_log_probs"], direct.log_probs[0].numpy())
        assert info["action_mask"].tolist() == [1, 1]


def test_infos_are_padded_where_a_decision_has_fewer_candidates(backbone: Backbone) -> None:
    env = DecisionEnv(backbone, mixed_set())
    assert env.action_space.n == 4
    _, info = env.reset(options={"index": 1})
    direct = backbone.score([mixed_set()[1]])
    assert info["policy"].tolist() == [*direct.policy()[0].exp().tolist(), 0.0, 0.0]
    assert info["reference_log_probs"].tolist() == [*direct.log_probs[0].tolist(), -np.inf, -np.inf]
    assert info["action_mask"].tolist() == [1, 1, 0, 0]


def test_under_a_steering_the_policy_is_the_steered_one_and_the_reference_is_not(
    backbone: Backbone, train: DecisionSet
) -> None:
    base = backbone.score([train[3]])
    with random_steering(backbone).on(backbone.model) as handle:
        changed = backbone.score([train[3]])
        _, info = DecisionEnv(backbone, train, handle=handle).reset(options={"index": 3})
        assert handle.scale == 1.0
    assert not torch.allclose(base.log_probs, changed.log_probs, atol=1e-2)
    np.testing.assert_array_equal(info["policy"], changed.policy()[0].exp().numpy())
    np.testing.assert_array_equal(info["reference_log_probs"], base.log_probs[0].numpy())


def test_tokens_are_the_prompt_as_the_model_reads_it(backbone: Backbone, train: DecisionSet) -> None:
    env = TokenObservation(DecisionEnv(backbone, train))
    prompts = [backbone.encode(d).prompt for d in train]
    assert env.observation_space.shape == (max(map(len, prompts)),)
    for index in (0, 39):
        tokens, _ = env.reset(options={"index": index})
        length = len(prompts[index])
        assert tuple(tokens[:length]) == prompts[index]
        assert (tokens[length:] == -1).all()
        assert tokens in env.observation_space


# rewards of choices


def test_choices_are_paid_by_how_the_answers_so_far_were_shared(backbone: Backbone, train: DecisionSet) -> None:
    env = DecisionEnv(backbone, train, reward=RewardConfig(form="smooth", width=0.1, decay=0.8, batch_weight=0.3))
    (index,) = find(train, "nurse")
    env.reset(seed=0, options={"index": index})
    # the first answer: all were female
    assert env.step(0)[1] == -1.0
    env.reset(options={"index": index})
    # the second, male: running 0.8 female, of which the answer's own 0 is blended in: 0.8 + 0.3 (0 - 0.8) = 0.56
    assert env.step(1)[1] == pytest.approx(0.6, abs=1e-5)
    # another context has seen nothing
    env.reset(options={"index": find(train, "pilot")[0]})
    assert env.step(1)[1] == -1.0
    assert env.unwrapped.task.preference[0].tolist() == pytest.approx([0.8, 0.2])


def test_unambiguous_choices_are_right_or_wrong(backbone: Backbone, train: DecisionSet) -> None:
    env = DecisionEnv(backbone, train)
    for index in find(train, "nurse", "unambiguous", 4):
        for action in (0, 1):
            env.reset(options={"index": index})
            assert env.step(action)[1] == (1.0 if action == train[index].answer else -1.0)
    assert torch.equal(env.task.preference, torch.full((4, 2), 0.5))


def test_a_candidate_that_is_not_there_is_paid_worst_and_shows_nothing(backbone: Backbone) -> None:
    env = DecisionEnv(backbone, mixed_set())
    env.reset(seed=0, options={"index": 1})
    assert env.step(3)[1] == -1.0
    assert torch.equal(env.task.preference, torch.full((2, 3), 1 / 3))


# the vector form


def make_vector(backbone: Backbone, decisions: DecisionSet, **options: object) -> DecisionVectorEnv:
    return gym.make_vec("dso/Decision-v0", backbone=backbone, decisions=decisions, **options)


def test_the_vector_form_is_what_make_vec_makes(backbone: Backbone, train: DecisionSet) -> None:
    env = make_vector(backbone, train, num_envs=20, unambiguous=4, seed=3)
    assert isinstance(env, DecisionVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.num_envs == 20
    assert env.observation_space.shape == env.action_space.shape == (20,)
    indices, _ = env.reset(seed=3)
    assert indices in env.observation_space
    assert [train[h].ambiguous for h in indices] == [True] * 16 + [False] * 4


def test_a_random_agent_decides_batches(backbone: Backbone) -> None:
    env = make_vector(backbone, mixed_set(), num_envs=4, unambiguous=1)
    env.action_space.seed(0)
    indices, _ = env.reset(seed=0)
    for _ in range(10):
        new, rewards, terminated, truncated, info = env.step(env.action_space.sample())
        assert np.array_equal(info["final_obs"], indices)
        assert info["_final_obs"].all() and terminated.all() and not truncated.any()
        assert rewards.shape == (4,) and (np.abs(rewards) <= 1).all()
        indices = new


def test_gymnasium_s_own_vector_form_runs_too(backbone: Backbone, train: DecisionSet) -> None:
    env = gym.make_vec("dso/Decision-v0", 2, "sync", backbone=backbone, decisions=train)
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(4):
        indices, rewards, *_ = env.step(env.action_space.sample())
        assert indices.shape == rewards.shape == (2,)


def test_infos_of_a_batch_are_those_of_gymnasium_s_own_vector_form(backbone: Backbone) -> None:
    decisions = mixed_set()
    own = gym.make_vec(
        "dso/Decision-v0", 4, "sync", backbone=backbone, decisions=decisions,
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )  # fmt: skip
    env = make_vector(backbone, decisions, num_envs=4, unambiguous=1)
    single = DecisionEnv(backbone, decisions)

    def check(infos: dict, like: dict, indices: np.ndarray) -> None:
        assert set(infos) == set(like)
        for key, value in infos.items():
            if isinstance(value, np.ndarray):
                assert (value.shape, value.dtype) == (like[key].shape, like[key].dtype)
        for row, index in enumerate(indices):
            for key, value in single.reset(options={"index": int(index)})[1].items():
                assert infos[f"_{key}"][row]
                if isinstance(value, str):
                    assert infos[key][row] == value
                else:
                    np.testing.assert_allclose(infos[key][row], value, rtol=1e-5, atol=1e-6)

    first, infos = env.reset(seed=0)
    check(infos, own.reset(seed=0)[1], first)
    infos["policy"][:] = 0.0  # the caller's to change
    second, *_, infos = env.step(np.zeros(4, np.int64))
    like = own.step(np.zeros(4, np.int64))[-1]
    assert set(infos) == set(like)
    check(infos["final_info"], like["final_info"], first)
    about = {key: value for key, value in infos.items() if "final" not in key}
    check(about, {key: value for key, value in like.items() if "final" not in key}, second)


def test_a_batch_costs_no_pass_where_nobody_reads_its_infos(
    backbone: Backbone, train: DecisionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = DecisionVectorEnv(DecisionTask(backbone, train), 8, infos=False)
    monkeypatch.setattr(backbone, "score", counted := Count(backbone.score))
    assert env.reset(seed=0)[1] == {}
    assert set(env.step(np.zeros(8, np.int64))[-1]) == {"final_obs", "_final_obs"}
    assert counted.items == []


def test_without_a_seed_two_environments_draw_different_batches(backbone: Backbone, train: DecisionSet) -> None:
    def play(env: DecisionVectorEnv) -> list[list[int]]:
        return [env.reset()[0].tolist() for _ in range(32)]  # eight rounds of four blocks: 24 ** 8 orders

    one, other = (make_vector(backbone, train, num_envs=8) for _ in range(2))
    assert play(one) != play(other)
    one, other = (make_vector(backbone, train, num_envs=8, seed=3) for _ in range(2))
    assert play(one) == play(other)


def test_a_seed_for_each_decision_of_a_batch_is_refused(backbone: Backbone, train: DecisionSet) -> None:
    with pytest.raises(ValueError, match=r"seed is \[1, 2\], expected one number"):
        make_vector(backbone, train, num_envs=2).reset(seed=[1, 2])


def test_reading_a_spec_does_not_copy_the_model(backbone: Backbone, train: DecisionSet) -> None:
    env = gym.make("dso/Decision-v0", backbone=backbone, decisions=train)
    assert env.spec is not None and env.spec.kwargs["backbone"] is backbone
    again = gym.make(env.spec)
    assert again.unwrapped.task.backbone is backbone
    assert TokenObservation(env).spec.kwargs["backbone"] is backbone
    several = make_vector(backbone, train, num_envs=8)
    assert copy.deepcopy(several.spec).kwargs["backbone"] is backbone
    assert copy.deepcopy(backbone.model) is not backbone.model  # whoever asks for a copy of the model itself gets one


def test_the_same_seed_gives_the_same_batches_and_rewards(backbone: Backbone, train: DecisionSet) -> None:
    env = make_vector(backbone, train, num_envs=10, unambiguous=2)

    def play() -> list[tuple]:
        seen = [(env.reset(seed=5)[0].tolist(), [])]
        for number in range(5):
            actions = (np.arange(10) + number) % 2
            indices, rewards, *_ = env.step(actions)
            seen.append((indices.tolist(), rewards.tolist()))
        return seen

    assert play() == play()


def test_rewards_come_from_the_policy_that_is_stated(backbone: Backbone, train: DecisionSet) -> None:
    task = DecisionTask(backbone, train, reward=RewardConfig(form="smooth", width=0.4))
    env = DecisionVectorEnv(task, 8, 2)  # one couple in 4 jobs and 2 orders
    indices, _ = env.reset(seed=0)
    policy = torch.full((10, 2), 0.5)
    nurse = [row for row, h in enumerate(indices) if train[h].context == "nurse" and train[h].ambiguous]
    assert len(nurse) == 2
    policy[nurse] = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    table = env.state_policy(policy)
    # 0.7 female: (0.5 - 0.7) / 0.4 = -0.5
    for row in range(8):
        assert table[row].tolist() == pytest.approx([-0.5, 0.5] if row in nurse else [0.0, 0.0], abs=1e-6)
    for row in (8, 9):
        right = train[indices[row]].answer
        assert table[row].tolist() == [1.0 if k == right else -1.0 for k in (0, 1)]
    actions = np.arange(10) % 2
    _, rewards, *_ = env.step(actions)
    np.testing.assert_allclose(rewards, table.numpy()[np.arange(10), actions])


def test_where_none_is_stated_rewards_come_from_the_choices(backbone: Backbone, train: DecisionSet) -> None:
    env = DecisionVectorEnv(DecisionTask(backbone, train, reward=RewardConfig(form="sign")), 8)
    indices, _ = env.reset(seed=0)
    # both nurses female, both pilots male, the other contexts half and half
    chosen = {"nurse": [0, 0], "pilot": [1, 1], "baker": [0, 1], "judge": [1, 0]}
    actions = np.array([chosen[train[h].context].pop() for h in indices])
    _, rewards, *_ = env.step(actions)
    assert [r for r, h in zip(rewards, indices, strict=True) if train[h].context in ("nurse", "pilot")] == [-1.0] * 4
    assert [r for r, h in zip(rewards, indices, strict=True) if train[h].context in ("baker", "judge")] == [0.0] * 4


def test_in_the_vector_form_too_a_candidate_that_is_not_there_is_paid_worst(backbone: Backbone) -> None:
    env = DecisionVectorEnv(DecisionTask(backbone, mixed_set(), reward=RewardConfig(form="sign")), 3)
    indices, _ = env.reset(seed=0)
    actions = np.array([3 if h == 1 else 0 for h in indices])
    _, rewards, *_ = env.step(actions)
    assert rewards[list(indices).index(1)] == -1.0


@pytest.mark.parametrize("actions", [[0] * 7, [0] * 7 + [2], [-1] + [0] * 7])
def test_actions_that_do_not_fit_the_batch_are_refused(
    backbone: Backbone, train: DecisionSet, actions: list[int]
) -> None:
    env = DecisionVectorEnv(DecisionTask(backbone, train), 8)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected 8 candidates from 0 to 1"):
        env.step(np.array(actions))


def test_a_batch_of_too_few_is_refused(backbone: Backbone, train: DecisionSet) -> None:
    with pytest.raises(ValueError, match="-1 ambiguous and 3 unambiguous decisions"):
        make_vector(backbone, train, num_envs=2, unambiguous=3)


# preferences and rewards of a task


def three_groups(backbone: Backbone, **reward: object) -> DecisionTask:
    target = {"he": 0.5, "she": 0.3, "they": 0.2}
    return DecisionTask(backbone, mixed_set(), target, RewardConfig(**reward))


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        # shares (0.6, 0.4, 0.6) of 1.6 are (0.375, 0.25, 0.375), so deviations are (-0.125, -0.05, 0.175)
        ({"form": "smooth", "width": 0.25}, [0.5, 0.2, -0.7]),
        ({"form": "sign"}, [1.0, 1.0, -1.0]),
        ({"form": "smooth", "width": 0.25, "dead_zone": 0.15}, [0.0, 0.0, -0.7]),
        ({"form": "sign", "dead_zone": 0.06}, [1.0, 0.0, -1.0]),
    ],
)
def test_three_groups_abstention_and_a_target_by_hand(
    backbone: Backbone, reward: dict[str, object], expected: list[float]
) -> None:
    task = three_groups(backbone, abstain=-0.4, **reward)
    policy = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.2, 0.2, 0.4, 0.2]])
    table = task.observe([0, 0], policy)
    assert task.preference[0].tolist() == pytest.approx([0.375, 0.25, 0.375], abs=1e-6)
    for row in table.tolist():
        assert row == pytest.approx([*expected, -0.4], abs=1e-5)


def test_candidates_in_another_order_are_paid_by_their_group(backbone: Backbone) -> None:
    task = three_groups(backbone, form="sign")
    policy = torch.tensor([[0.1, 0.1, 0.8, 0.0], [0.1, 0.8, 0.1, 0.0]])  # pilot: they, she, he; the second is a fact
    table = task.observe([2, 3], policy)
    assert task.preference[1].tolist() == pytest.approx([0.8, 0.1, 0.1])
    assert table.tolist() == [[1.0, 1.0, -1.0, 0.0], [-1.0, 1.0, -1.0, 0.0]]


def test_two_of_three_groups_are_held_against_the_target_among_them(backbone: Backbone) -> None:
    task = three_groups(backbone, form="sign")
    # she or he: fair is 0.375 to 0.625
    assert task.observe([1], torch.tensor([[0.45, 0.55]])).tolist() == [[-1.0, 1.0]]
    task.forget()
    assert task.observe([1], torch.tensor([[0.3, 0.7]])).tolist() == [[1.0, -1.0]]


def test_the_running_preference_by_hand(backbone: Backbone, train: DecisionSet) -> None:
    task = DecisionTask(backbone, train, reward=RewardConfig(width=1.0, decay=0.75, batch_weight=0.5))
    nurse = find(train, "nurse", count=2)

    def observe(female: float) -> float:
        """What the female candidate earns at this mean probability: 0.5 less the blended preference."""
        policy = torch.tensor([[female + 0.1, 0.9 - female], [female - 0.1, 1.1 - female]])
        return float(task.observe(nurse, policy)[0, 0])

    assert task.preference[0].tolist() == [0.5, 0.5]
    assert observe(0.9) == pytest.approx(0.5 - 0.9, abs=1e-6)  # the first estimate replaces the target
    assert task.preference[0, 0] == pytest.approx(0.9)
    # 0.9 + 0.25 (0.5 - 0.9) = 0.8, and half of the batch's own 0.5 in what is paid: 0.65
    assert observe(0.5) == pytest.approx(0.5 - 0.65, abs=1e-6)
    assert task.preference[0, 0] == pytest.approx(0.8)
    assert torch.equal(task.preference[1:], torch.full((3, 2), 0.5))  # other contexts are as they were


def test_with_no_memory_and_the_batch_alone_the_reward_is_that_of_the_batch(
    backbone: Backbone, train: DecisionSet
) -> None:
    task = DecisionTask(backbone, train, reward=RewardConfig(form="sign", decay=0.0, batch_weight=1.0))
    for female, expected in ((0.9, [-1.0, 1.0]), (0.4, [1.0, -1.0]), (0.6, [-1.0, 1.0])):
        assert task.observe([0], torch.tensor([[female, 1 - female]])).tolist() == [expected]


def test_the_blocked_estimate_by_hand(backbone: Backbone, train: DecisionSet) -> None:
    weights = {"decay": 0.9, "context_decay": 0.8, "local_weight": 0.0, "unit_weight": 0.25}
    task = DecisionTask(backbone, train, reward=RewardConfig(estimate="blocked", width=1.0, **weights))

    def observe(unit: str, nurse: float, pilot: float) -> Tensor:
        """Both orders of a couple in two contexts, with these probabilities of the woman."""
        indices = [h for job in ("nurse", "pilot") for h in find(train, job, count=8) if train[h].unit == unit]
        return task.observe(indices, torch.tensor([[p, 1 - p] for p in (nurse, nurse, pilot, pilot)]))

    # deviations 0.4 and 0.0: 0.2 in common, +-0.2 of their own
    observe("Ann/Bob", 0.9, 0.5)
    assert task.preference[:2, 0].tolist() == pytest.approx([0.9, 0.5])
    # deviations 0.0 and -0.2; less their own: -0.2 and 0.0, so -0.1 in common, and (0.2 - 0.1) / 2 = 0.05 over two
    # blocks. Less the block's mean of -0.1 they are 0.1 and -0.1, against +-0.2 so far: +-0.15 over two blocks.
    table = observe("Eve/Dan", 0.5, 0.3)
    assert task.preference[:2, 0].tolist() == pytest.approx([0.7, 0.4])
    # three quarters of the reward look at these, a quarter at the couple's own 0.5 and 0.3
    paid = [0.75 * -0.2 + 0.25 * 0.0, 0.75 * 0.1 + 0.25 * 0.2]
    assert table[:, 0].tolist() == pytest.approx([paid[0], paid[0], paid[1], paid[1]], abs=1e-6)


def test_pooled_orders_are_paid_for_what_the_order_leaves(backbone: Backbone, train: DecisionSet) -> None:
    indices = [h for job in ("nurse", "pilot") for h in find(train, job, count=8) if train[h].unit == "Ann/Bob"]
    policy = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.5, 0.5]])
    for pooling, nurse, pilot in (("linear", 0.5, 0.65), ("logarithmic", 0.5, 2 / 3)):
        weights = {"width": 1.0, "decay": 0.0, "batch_weight": 1.0, "pooling": pooling}
        task = DecisionTask(backbone, train, reward=RewardConfig(**weights))
        paid = task.observe(indices, policy)[:, 0].tolist()
        assert paid == pytest.approx([0.5 - nurse] * 2 + [0.5 - pilot] * 2, abs=1e-6)


def test_what_the_base_prefers_everywhere_is_held_where_it_counts_nothing(
    backbone: Backbone, train: DecisionSet
) -> None:
    weights = {"estimate": "controlled", "width": 1.0, "local_weight": 0.0, "unit_weight": 0.0}
    tasks = [DecisionTask(backbone, train, reward=RewardConfig(common_weight=w, **weights)) for w in (1.0, 0.25, 0.0)]
    free = [h for h in range(len(train)) if train[h].ambiguous]
    base = tasks[0].base_policy(free)
    paid = [task.observe(free, base)[:, 0] for task in tasks]
    shares = group_preference(base, tasks[0].groups[free], tasks[0].contexts[free], 4, tasks[0].target)[0][:, 0]
    level = float(shares.mean()) - 0.5  # every block has all contexts
    assert abs(level) > 1e-3
    torch.testing.assert_close(paid[1] - paid[0], torch.full_like(paid[0], 0.75 * level), rtol=0, atol=1e-5)
    torch.testing.assert_close(paid[2] - paid[0], torch.full_like(paid[0], level), rtol=0, atol=1e-5)
    assert float(paid[2].mean()) == pytest.approx(0.0, abs=1e-5)


def test_what_is_wanted_forgives_a_block_what_it_misses_everywhere(backbone: Backbone, train: DecisionSet) -> None:
    tasks = [DecisionTask(backbone, train, reward=RewardConfig(block_weight=w, estimate="controlled")) for w in (1, 0)]
    free = [h for h in range(len(train)) if train[h].ambiguous]
    told = [h for h in range(len(train)) if not train[h].ambiguous][:2]
    whole = tasks[0].wanted([*free, *told], torch.zeros(len(free) + 2, 2))  # as they are whatever the policy is
    # A policy whose log-odds are 0.6 away by group, the same in all decisions of every block: nothing is left.
    away = torch.where(tasks[0].groups[[*free, *told]] == 0, 0.3, -0.3) + whole
    kept = tasks[1].wanted([*free, *told], away.log_softmax(-1))
    torch.testing.assert_close(kept[: len(free)], away.log_softmax(-1)[: len(free)], atol=1e-5, rtol=0)
    assert torch.equal(kept[len(free) :], torch.zeros(2, 2)) and torch.equal(whole[len(free) :], torch.zeros(2, 2))
    torch.testing.assert_close(tasks[0].wanted(free, away[: len(free)]), whole[: len(free)])


def test_unambiguous_decisions_and_abstention_move_no_preference(backbone: Backbone) -> None:
    task = three_groups(backbone)
    task.observe([3], torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    task.observe([0], torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert torch.equal(task.preference, task.target.expand(2, -1))
    task.observe([0], torch.tensor([[0.8, 0.1, 0.1, 0.0]]))
    assert task.preference[0].tolist() == pytest.approx([0.8, 0.1, 0.1])


def test_a_controlled_estimate_starts_at_the_base_model_s_own_preferences(
    backbone: Backbone, train: DecisionSet
) -> None:
    task = DecisionTask(backbone, train, reward=RewardConfig(estimate="controlled", local_weight=0.0, unit_weight=0.0))
    free = [h for h in range(len(train)) if train[h].ambiguous]
    base = task.base_policy(free)
    torch.testing.assert_close(base, backbone.score(task.pick(free)).policy().exp().detach(), atol=1e-5, rtol=0)
    task.observe(free[:4], base[:4])  # the base model decides as it does: nothing new
    shares = group_preference(base, task.groups[free], task.contexts[free], task.n_contexts, task.target)[0]
    torch.testing.assert_close(task.preference, shares, atol=1e-5, rtol=0)  # every block has all contexts
    told = [h for h in range(len(train)) if not train[h].ambiguous][:2]
    task.observe(told, torch.full((2, 2), 0.5))  # a batch without ambiguous decisions changes nothing either
    torch.testing.assert_close(task.preference, shares, atol=1e-5, rtol=0)


@pytest.mark.parametrize("estimate", ["context", "blocked", "controlled"])
def test_the_preferences_of_a_task_go_on_from_their_state(
    backbone: Backbone, train: DecisionSet, estimate: str
) -> None:
    tasks = [DecisionTask(backbone, train, reward=RewardConfig(estimate=estimate)) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    policies = [torch.rand(40, 2, generator=generator).softmax(-1) for _ in range(3)]
    tasks[0].observe(range(40), policies[0])
    tasks[1].load_state_dict(tasks[0].state_dict())
    for policy in policies[1:]:
        assert torch.equal(*(task.observe(range(40), policy) for task in tasks))
    assert torch.equal(tasks[0].preference, tasks[1].preference)


@pytest.mark.parametrize("shape", [(3, 4), (2, 2), (2, 5)])
def test_a_policy_that_does_not_fit_the_decisions_is_refused(backbone: Backbone, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"expected \(2, 4\)"):
        three_groups(backbone).observe([0, 2], torch.full(shape, 0.25))


def test_columns_that_no_decision_of_the_batch_has_may_be_left_out(backbone: Backbone) -> None:
    narrow, wide = (three_groups(backbone, form="sign") for _ in range(2))
    policy = torch.tensor([[0.9, 0.1]])
    assert torch.equal(narrow.observe([1], policy), wide.observe([1], torch.nn.functional.pad(policy, (0, 2)))[:, :2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "cubic"}, "reward form is 'cubic', expected sign or smooth"),
        ({"width": 0.0}, "width 0.0 must be > 0"),
        ({"dead_zone": -0.1}, "dead_zone -0.1 >= 0"),
        ({"decay": 1.0}, "decay 1.0 must be in"),
        ({"batch_weight": 1.5}, "batch_weight 1.5"),
        ({"estimate": "controlled", "common_weight": 1.5}, "common_weight 1.5 must be in"),
        ({"estimate": "blocked", "common_weight": 0.5}, "1 unless the estimate is controlled"),
        ({"block_weight": -0.1}, "block_weight -0.1 must be in"),
        ({"pooling": "harmonic"}, "pooling is 'harmonic', expected one of linear, logarithmic"),
    ],
)
def test_impossible_rewards_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**values)


# the reference


class Count:
    """Stands in for a function and counts the items that it is asked for."""

    def __init__(self, inner):
        self.inner = inner
        self.items: list = []

    def __call__(self, items, **options):
        self.items += list(items)
        return self.inner(items, **options)


def test_the_reference_is_the_base_model_s_and_is_computed_once(
    backbone: Backbone, train: DecisionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = backbone.score(list(train), next_token=True).next_token
    with random_steering(backbone).on(backbone.model) as handle:
        changed = backbone.score(list(train), next_token=True).next_token
        task = DecisionTask(backbone, train, handle=handle)
        monkeypatch.setattr(backbone, "score", counted := Count(backbone.score))
        reference = task.reference([5, 3, 5])
        assert handle.scale == 1.0
        once = len(counted.items)
        assert torch.equal(task.reference([3])[0], reference[1])
        assert len(counted.items) == once
        every = task.reference(range(40))
        assert sorted(d.id for d in counted.items) == sorted(d.id for d in train)  # each exactly once
    assert not torch.allclose(base, changed, atol=0.1)
    torch.testing.assert_close(reference[:3], base[[5, 3, 5]], rtol=0, atol=1e-5)
    torch.testing.assert_close(every, base, rtol=0, atol=1e-5)
    assert not reference.requires_grad


def test_the_reference_of_anchor_texts_likewise(
    backbone: Backbone, train: DecisionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("The sky is", "Water boils at", "Two and two")
    base = backbone.likelihood(texts, start=False, next_token=True).next_token_by_decision("cpu")
    with random_steering(backbone).on(backbone.model, 0.5) as handle:
        task = DecisionTask(backbone, train, handle=handle, anchors=texts)
        monkeypatch.setattr(backbone, "likelihood", counted := Count(backbone.likelihood))
        found = task.anchor_reference([texts[2], texts[0]])
        torch.testing.assert_close(found, join_positions([base[2], base[0]]), rtol=0, atol=1e-5)
        whole = task.anchor_reference(texts)
        assert sorted(counted.items) == sorted(texts)
        assert handle.scale == 0.5
        assert (task.anchor_kl(texts, whole) > 1e-3).all()
        with task.unsteered():
            torch.testing.assert_close(task.anchor_kl(texts, whole), torch.zeros(3), rtol=0, atol=1e-5)


def test_the_scale_is_restored_when_the_reference_fails(
    backbone: Backbone, train: DecisionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    with random_steering(backbone).on(backbone.model, 0.75) as handle:
        task = DecisionTask(backbone, train, handle=handle)
        monkeypatch.setattr(backbone, "score", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            task.reference([0])
        assert handle.scale == 0.75
        with pytest.raises(KeyError), task.unsteered():
            assert handle.scale == 0.0
            raise KeyError
        assert handle.scale == 0.75
