"""SteeringSearchEnv and its bases: the Gymnasium contract, what is measured, and that plain PPO learns."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from stable_baselines3.common.monitor import Monitor
from tiny import byte_tokenizer, small_set, tiny_llama

import envs  # noqa: F401 - registers the environments
from dso.decisions.decision import Candidate, Decision, DecisionSet
from dso.evaluation.bias import bias_report
from dso.evaluation.evaluator import Evaluator
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from envs.search import SteeringSearchEnv, group_basis, random_basis

M = 3
FIRST, LAST = "model.layers.0.input_layernorm", "model.norm"


@pytest.fixture
def train() -> DecisionSet:
    """32 ambiguous decisions (4 couples x 4 jobs x 2 orders) and 8 unambiguous ones; see conftest."""
    return small_set(("train",))


@pytest.fixture
def steering(backbone: Backbone) -> Steering:
    return Steering.for_model(backbone.model)


def make(backbone: Backbone, train: DecisionSet, steering: Steering, **options: object) -> SteeringSearchEnv:
    basis = options.pop("basis", None) or random_basis(steering, M, seed=1, step=0.2)
    return SteeringSearchEnv(backbone, train, steering, basis, **{"ambiguous": 16, "unambiguous": 4, **options})


# the Gymnasium contract


def test_it_passes_both_checkers_without_a_warning(backbone: Backbone, train: DecisionSet, steering: Steering) -> None:
    basis = random_basis(steering, M)
    made = gym.make(
        "dso/SteeringSearch-v0", backbone=backbone, decisions=train, steering=steering, basis=basis, ambiguous=16
    )
    assert isinstance(made.unwrapped, SteeringSearchEnv)
    assert made.unwrapped.task.backbone is backbone  # no copy of the model
    assert made.unwrapped.steering is steering
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped)
        check_sb3_env(made.unwrapped)


def test_reading_a_spec_copies_no_model_and_no_steering(
    backbone: Backbone, train: DecisionSet, steering: Steering
) -> None:
    basis = random_basis(steering, M)
    env = gym.make("dso/SteeringSearch-v0", backbone=backbone, decisions=train, steering=steering, basis=basis)
    assert env.spec.kwargs["backbone"] is backbone and env.spec.kwargs["steering"] is steering


def test_without_a_seed_two_searches_draw_different_minibatches(
    backbone: Backbone, train: DecisionSet, steering: Steering
) -> None:
    one, other = (make(backbone, train, steering) for _ in range(2))
    drawn = [[env.sampler.draw().tolist() for _ in range(16)] for env in (one, other)]  # 24 ** 8 orders of the blocks
    assert drawn[0] != drawn[1]


def test_a_random_agent_searches_until_the_horizon(backbone: Backbone, train: DecisionSet, steering: Steering) -> None:
    env = make(backbone, train, steering, horizon=3)
    env.action_space.seed(0)
    assert env.action_space.shape == (M,)
    assert env.observation_space.shape == (M + 2 + 3,)
    rewards = []
    for _ in range(3):
        env.reset(seed=None)
        for left in (2, 1, 0):
            observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert observation in env.observation_space
            assert (terminated, truncated) == (False, left == 0)
            assert set(info) == {"bias", "kl", "correctness"}
            rewards.append(reward)
    assert len(set(rewards)) == 9
    assert env.best.gain >= 0


def test_several_environments_share_one_model(backbone: Backbone, train: DecisionSet, steering: Steering) -> None:
    options = {"backbone": backbone, "decisions": train, "steering": steering, "basis": random_basis(steering, M)}
    both = gym.make_vec("dso/SteeringSearch-v0", 2, "sync", ambiguous=16, **options)
    both.reset(seed=[3, 3])
    actions = np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 0.5]], np.float32)
    _, together, *_ = both.step(actions)
    alone = make(backbone, train, Steering.for_model(backbone.model), basis=options["basis"], unambiguous=0)
    for action, reward in zip(actions, together, strict=True):
        alone.reset(seed=3)
        assert alone.step(action)[1] == pytest.approx(reward, abs=1e-6)


def test_the_same_seed_gives_the_same_minibatches_and_rewards(
    backbone: Backbone, train: DecisionSet, steering: Steering
) -> None:
    env = make(backbone, train, steering)
    action = np.array([0.5, -0.5, 1.0], np.float32)

    def play() -> list[float]:
        rewards = []
        for seed in (2, None, None):
            env.reset(seed=seed)
            rewards += [env.step(action)[1], env.step(action)[1]]
        return rewards

    first = play()
    assert first[0] == first[1]  # an episode keeps its minibatch
    assert len({first[0], first[2], first[4]}) > 1  # the next one has its own
    assert play() == first


@pytest.mark.parametrize("action", [np.zeros(2, np.float32), np.array([0.0, np.nan, 0.0], np.float32), np.float32(0.0)])
def test_an_action_that_is_none_is_refused(
    backbone: Backbone, train: DecisionSet, steering: Steering, action: np.ndarray
) -> None:
    env = make(backbone, train, steering)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(M, np.float32))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected 3 finite numbers"):
        env.step(action)


@pytest.mark.parametrize(
    "options", [{"ambiguous": 0}, {"horizon": 0}, {"radius": 0.0}, {"kl_budget": 0.0}, {"kl_weight": -1.0}]
)
def test_impossible_options_are_refused(
    backbone: Backbone, train: DecisionSet, steering: Steering, options: dict[str, float]
) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}={options[name]}"):
        make(backbone, train, steering, **options)


def test_a_basis_of_another_steering_is_refused(backbone: Backbone, train: DecisionSet, steering: Steering) -> None:
    key, value = next(iter(random_basis(steering, M).items()))
    with pytest.raises(ValueError, match="'model.nowhere.b'.*no such key"):
        make(backbone, train, steering, basis={"model.nowhere.b": value})
    with pytest.raises(ValueError, match=r"of shape \(3, 15\), the steering has \(3, 16\)"):
        make(backbone, train, steering, basis={key: value[:, 1:]})
    with pytest.raises(ValueError, match=r"parts of \[2, 3\] directions"):
        make(backbone, train, steering, basis={key: value, f"{LAST}.b": value[:2]})
    with pytest.raises(ValueError, match=r"parts of \[\] directions"):
        SteeringSearchEnv(backbone, train, steering, {})


# what is measured


def test_a_proposal_is_the_start_plus_the_basis(backbone: Backbone, train: DecisionSet, steering: Steering) -> None:
    with torch.no_grad():
        steering.tensors()[f"{LAST}.b"].fill_(0.5)
    basis = {f"{LAST}.b": torch.stack([torch.full((16,), 0.1), torch.arange(16.0)])}
    env = make(backbone, train, steering, basis=basis, radius=2.0)
    env.reset(seed=0)
    env.step(np.array([1.0, -0.25], np.float32))
    # 0.5 + 2 (0.1 - 0.25 i)
    expected = 0.7 - 0.5 * torch.arange(16.0)
    torch.testing.assert_close(steering.tensors()[f"{LAST}.b"].detach(), expected)
    env.step(np.array([-7.0, 0.0], np.float32))  # clipped to -1; not a move from where it was
    torch.testing.assert_close(steering.tensors()[f"{LAST}.b"].detach(), torch.full((16,), 0.3))
    assert not steering.tensors()[f"{FIRST}.b"].any()
    env.reset()
    torch.testing.assert_close(steering.tensors()[f"{LAST}.b"].detach(), torch.full((16,), 0.5))


def test_the_reward_is_that_of_the_steered_model(backbone: Backbone, train: DecisionSet, steering: Steering) -> None:
    """Against a minibatch that is the whole set, measured by itself."""
    target = {"female": 0.7, "male": 0.3}
    options = {"target": target, "kl_budget": 0.05, "kl_weight": 3.0, "accuracy_weight": 0.25}
    env = make(backbone, train, steering, ambiguous=32, unambiguous=8, **options)
    start, at_start = env.reset(seed=0)
    z = np.array([0.9, -0.6, 0.3], np.float32)
    observation, reward, _, _, info = env.step(z)
    with steering.on(backbone.model) as handle, torch.no_grad():
        base, steered = Evaluator(backbone, train, handle).curve([0.0, 1.0])
    free = np.array([d.ambiguous for d in train])
    jobs = np.array([d.context for d in train])
    female = np.array([steered.policy[free & (jobs == job), 0].mean() for job in dict.fromkeys(jobs)])
    bias = np.mean(2 * np.abs(female - 0.7))
    right = np.mean([steered.policy[i, d.answer] for i, d in enumerate(train) if not d.ambiguous])
    kl = steered.kl.mean()
    assert kl > 0.05
    assert info == pytest.approx({"bias": bias, "kl": kl, "correctness": right}, abs=1e-5)
    assert reward == pytest.approx(-bias - 3.0 * (kl - 0.05) + 0.25 * right, abs=1e-4)
    drift = np.mean(female) - 0.7
    np.testing.assert_allclose(observation, [*z, drift, -drift, bias / 2, kl / (kl + 0.05), right], atol=1e-5)
    # at the start it is the base model
    at_base = np.mean([base.policy[i, d.answer] for i, d in enumerate(train) if not d.ambiguous])
    assert start[:M].tolist() == [0.0] * M
    assert at_start["kl"] == pytest.approx(0.0, abs=1e-6)
    assert at_start["correctness"] == pytest.approx(at_base, abs=1e-5)
    assert at_start["bias"] == pytest.approx(bias_report(base.policy, train, target, bootstrap=0).paper, abs=1e-5)


def test_inside_the_budget_kl_costs_nothing(backbone: Backbone, train: DecisionSet, steering: Steering) -> None:
    env = make(backbone, train, steering, unambiguous=0, kl_budget=50.0)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.ones(M, np.float32))
    assert set(info) == {"bias", "kl"}
    assert info["kl"] > 0.01
    assert reward == -info["bias"]


def hooks(backbone: Backbone) -> int:
    return sum(len(module._forward_hooks) for module in backbone.model.modules())


def test_the_model_is_steered_only_while_it_is_measured(
    backbone: Backbone, train: DecisionSet, steering: Steering
) -> None:
    base = backbone.score(list(train)).log_probs
    env = make(backbone, train, steering)
    env.reset(seed=0)
    env.step(np.ones(M, np.float32))
    assert hooks(backbone) == 0
    assert torch.equal(backbone.score(list(train)).log_probs, base)
    env.close()


def test_a_steering_that_is_attached_already_is_not_attached_twice(
    backbone: Backbone, train: DecisionSet, steering: Steering
) -> None:
    action, basis = np.array([1.0, 0.5, -1.0], np.float32), random_basis(steering, M, step=0.2)
    alone = make(backbone, train, Steering.for_model(backbone.model), basis=basis)
    alone.reset(seed=0)
    with steering.on(backbone.model) as handle:
        env = make(backbone, train, steering, basis=basis, handle=handle)
        env.reset(seed=0)
        before = hooks(backbone)
        _, reward, _, _, info = env.step(action)
        assert handle.scale == 1.0
        assert hooks(backbone) == before == len(steering.config.sites) + 1  # which watches the caches of the model
    _, same, _, _, expected = alone.step(action)
    assert info == pytest.approx(expected, abs=1e-6)
    assert reward == pytest.approx(same, abs=1e-6)


def test_nothing_has_a_gradient(
    backbone: Backbone, train: DecisionSet, steering: Steering, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    score = backbone.score

    def watched(*args, **options):
        result = score(*args, **options)
        asked.append(result.log_probs.requires_grad)
        return result

    monkeypatch.setattr(backbone, "score", watched)
    env = make(backbone, train, steering)
    env.reset(seed=0)
    env.step(np.ones(M, np.float32))
    assert asked and not any(asked)
    assert all(p.grad is None for p in (*steering.parameters(), *backbone.model.parameters()))


def test_the_best_has_the_largest_gain_inside_the_budget(
    backbone: Backbone, train: DecisionSet, steering: Steering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards that depend on the minibatch count by what they exceed its start by."""
    env = make(backbone, train, steering, kl_budget=0.1)
    script = iter(
        # reward, KL: an easy minibatch
        [(-0.1, 0.0), (-0.3, 0.05), (0.2, 0.11), (0.1, 0.1)]
        # a hard one
        + [(-0.9, 0.0), (-0.2, 0.2), (-0.5, 0.01), (-0.7, 0.0)]
    )
    observation = np.zeros(env.observation_space.shape, np.float32)
    monkeypatch.setattr(env, "_measure", lambda z: (observation, (row := next(script))[0], {"kl": row[1]}))
    assert (env.best.coefficients.tolist(), env.best.gain) == ([0.0] * M, 0.0)
    proposals = np.linspace(-1, 1, 6 * M, dtype=np.float32).reshape(6, M)
    gains = []
    for number, z in enumerate(proposals):
        if number % 3 == 0:
            env.reset()
        env.step(z)
        gains.append(env.best.gain)
    assert gains == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.4, 0.4])
    assert np.array_equal(env.best.coefficients, proposals[4])
    env.apply_best()
    found = {key: value.detach().clone() for key, value in steering.tensors().items()}
    for key, part in random_basis(steering, M, seed=1, step=0.2).items():
        torch.testing.assert_close(found[key], sum(z * p for z, p in zip(proposals[4].tolist(), part, strict=True)))


# bases


def flat(basis: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten(1) for value in basis.values()], dim=1)


@pytest.mark.parametrize("operator", ["affine", "bias", "low_rank"])
def test_random_directions_are_orthogonal_and_of_one_size(backbone: Backbone, operator: str) -> None:
    steering = Steering.for_model(backbone.model, operator=operator, rank=2 if operator == "low_rank" else None)
    basis = random_basis(steering, 5, seed=3, step=0.1)
    assert {key: value.shape[1:] for key, value in basis.items()} == {k: v.shape for k, v in steering.tensors().items()}
    rows = flat(basis)
    torch.testing.assert_close(rows @ rows.T, 0.1**2 * rows.shape[1] * torch.eye(5), rtol=0, atol=1e-4)
    assert torch.equal(rows, flat(random_basis(steering, 5, seed=3, step=0.1)))
    assert not torch.allclose(rows, flat(random_basis(steering, 5, seed=4, step=0.1)))


@pytest.mark.parametrize("m", [0, 161])
def test_more_directions_than_coefficients_are_refused(steering: Steering, m: int) -> None:
    with pytest.raises(ValueError, match=f"{m} directions, expected 1 to 160"):  # 5 norms x 16 x (a, b)
        random_basis(steering, m)


def outputs(backbone: Backbone, decisions: DecisionSet, site: str) -> torch.Tensor:
    """(N, d) the site's output at the answer position, one prompt at a time."""
    caught = []
    module = backbone.model.get_submodule(site)
    hook = module.register_forward_hook(lambda _, __, output: caught.append(output[0, -1].double()))
    with torch.no_grad():
        for decision in decisions:
            backbone.model(torch.tensor([backbone.encode(decision).prompt]))
    hook.remove()
    return torch.stack(caught)


def test_group_directions_are_those_of_the_data(backbone: Backbone, train: DecisionSet, steering: Steering) -> None:
    """Against NumPy's covariance and correlation of activations caught one prompt at a time."""
    basis = group_basis(backbone, steering, train, 2, step=0.1)  # one run of all sites: a shift and a contraction
    ambiguous = train.select(kind="ambiguous")
    female = backbone.score(list(ambiguous)).policy().exp()[:, 0].detach().double().numpy()
    for site in (LAST, "model.layers.1.post_attention_layernorm"):
        h = outputs(backbone, ambiguous, site).numpy()
        size = np.sqrt((h**2).sum(1).mean())
        covariance = np.array([np.cov(h[:, j], female)[0, 1] for j in range(16)])
        np.testing.assert_allclose(
            basis[f"{site}.b"][0], 0.1 * size * covariance / np.linalg.norm(covariance), rtol=1e-3, atol=1e-5
        )
        assert not basis[f"{site}.a"][0].any()
        explained = np.array([np.corrcoef(h[:, j], female)[0, 1] ** 2 for j in range(16)])
        a, b = basis[f"{site}.a"][1].double().numpy(), basis[f"{site}.b"][1].double().numpy()
        np.testing.assert_allclose(a / a.min(), explained / explained.max(), rtol=1e-2, atol=1e-4)
        np.testing.assert_allclose(b, -a * h.mean(0), rtol=1e-3, atol=1e-5)
        moved = np.sqrt(((a * h + b) ** 2).sum(1).mean())
        assert a.min() == pytest.approx(-1.0) or moved == pytest.approx(0.1 * size, rel=1e-3)
        assert a.min() >= -1 - 1e-6


def test_a_site_that_tells_nothing_apart_is_left_alone(
    backbone: Backbone, train: DecisionSet, steering: Steering
) -> None:
    """All prompts end in the same letter, so the first norm puts out the same, but for rounding, after each."""
    basis = group_basis(backbone, steering, train, 2)
    assert not basis[f"{FIRST}.a"].any() and not basis[f"{FIRST}.b"].any()
    assert basis[f"{LAST}.a"].any() and basis[f"{LAST}.b"].any()


def test_runs_of_sites_are_taken_from_the_last(backbone: Backbone, train: DecisionSet, steering: Steering) -> None:
    basis = group_basis(backbone, steering, train, 3)  # two runs of 3 and 2 sites, with 2 and 1 of 2 directions
    sites = list(steering.config.sites)
    moved = [[s for s in sites if basis[f"{s}.a"][j].any() or basis[f"{s}.b"][j].any()] for j in range(3)]
    assert moved == [sites[3:], sites[3:], sites[1:3]]  # the first site tells nothing apart
    assert [bool(basis[f"{LAST}.a"][j].any()) for j in range(3)] == [False, True, False]


def test_operators_without_a_scale_have_no_contraction(backbone: Backbone, train: DecisionSet) -> None:
    steering = Steering.for_model(backbone.model, operator="bias")
    basis = group_basis(backbone, steering, train, 5)  # one site a run
    assert set(basis) == set(steering.tensors())
    assert [bool(basis[f"{LAST}.b"][j].any()) for j in range(5)] == [True, False, False, False, False]
    with pytest.raises(ValueError, match="6 directions, expected 1 to 5"):
        group_basis(backbone, steering, train, 6)


def test_three_groups_have_a_shift_each(backbone: Backbone) -> None:
    candidates = tuple(Candidate(text=f" {word}", group=word) for word in ("he", "she", "they"))
    prompts = ("The nurse said", "The pilot saw", "My judge was", "A baker left")
    decisions = DecisionSet(
        tuple(Decision(id=p, context=p, kind="ambiguous", prompt=p, candidates=candidates) for p in prompts)
    )
    steering = Steering.for_model(backbone.model)
    basis = group_basis(backbone, steering, decisions, 4)  # one run: three shifts and a contraction
    shifts = basis[f"{LAST}.b"][:3]
    assert torch.linalg.matrix_rank(shifts, tol=1e-3) == 2  # what the shares gain together is nothing
    assert [bool(basis[f"{LAST}.a"][j].any()) for j in range(4)] == [False, False, False, True]
    env = SteeringSearchEnv(backbone, decisions, steering, basis, ambiguous=4)
    observation, _ = env.reset(seed=0)
    assert observation.shape == env.observation_space.shape == (4 + 3 + 3,)
    assert observation[4:7].sum() == pytest.approx(0.0, abs=1e-6)


def test_decisions_that_all_prefer_alike_give_no_direction(backbone: Backbone, steering: Steering) -> None:
    alone = small_set(("train",)).select(lambda d: d.context == "nurse" and d.unit == "Ann/Bob" and d.id[-1] == "0")
    with pytest.raises(ValueError, match="prefers the groups alike"):
        group_basis(backbone, steering, alone.select(kind="ambiguous"), 2)


# plain PPO


def test_plain_ppo_finds_a_fairer_model(train: DecisionSet) -> None:
    """Unchanged Stable-Baselines3, forward passes only; bias is measured apart from the environment."""
    backbone = Backbone(tiny_llama(6), byte_tokenizer(), "tiny")
    ambiguous = train.select(kind="ambiguous")
    steering = Steering.for_model(backbone.model)
    env = SteeringSearchEnv(backbone, ambiguous, steering, group_basis(backbone, steering, ambiguous, 6), ambiguous=32)

    def measure() -> tuple[float, float, float]:
        """Bias of the base, bias and KL of the steered model."""
        with steering.on(backbone.model) as handle:
            base, now = Evaluator(backbone, ambiguous, handle).curve([0.0, 1.0])
        biases = (bias_report(m.policy, ambiguous, bootstrap=0).paper for m in (base, now))
        return (*biases, float(now.kl.mean()))

    episodes = Monitor(env)
    agent = PPO(
        "MlpPolicy", episodes, n_steps=32, batch_size=32, gamma=0.0, learning_rate=0.01, seed=0, device="cpu",
        policy_kwargs={"log_std_init": -0.5},
    )  # fmt: skip
    agent.learn(640)
    rewards = np.array(episodes.get_episode_rewards()) / env.horizon
    assert rewards[-8:].mean() > rewards[:8].mean() + 0.1
    env.apply_best()
    base, best, kl = measure()
    assert base > 0.4
    assert best < 0.5 * base
    assert kl <= env.kl_budget + 1e-3
    assert base - best == pytest.approx(env.best.gain, abs=1e-3)  # the minibatch was the whole set
    observation, _ = env.reset(seed=0)
    env.set_coefficients(agent.predict(observation, deterministic=True)[0])
    assert measure()[1] < 0.7 * base
