"""The rules of the advisor, as a table: when a rule holds, what it recommends, why, and who showed it.

Rules that say that there is not enough evidence are rules like the others. What the literature does not settle is said
too: fixed weights that were tuned are hard to beat (Kurin et al. 2022, Xin et al. 2022), and joint training of sequence
labelling tasks often does not help (Martínez Alonso & Plank 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import advice_conditions as when
from .evidence import Evidence

__all__ = ["RULES", "TOPICS", "Rule"]

TOPICS = ("sharing", "sampling", "weighting", "combination", "comparison")

_NEGATIVE_RESULTS = (
    "Kurin et al. 2022, In defense of the unitary scalarization for deep multi-task learning; "
    "Xin et al. 2022, Do current multi-task optimization methods in deep learning even help?"
)
_THIS_MEASUREMENT = "the measurement itself"
_GROUPS = (
    "Standley et al. 2020, Which tasks should be learned together in multi-task learning?; "
    "Fifty et al. 2021, Efficiently identifying task groupings for multi-task learning"
)


@dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        name: A short name.
        topic: One of `TOPICS`.
        condition: Evidence → the numbers on which the recommendation rests, or None where the rule does not hold.
        recommendation: What to do, or what is not known.
        reason: Why.
        source: Who showed it: authors, year, title.
        enough: False for rules that say that there is not enough evidence.
    """

    name: str
    topic: str
    condition: Callable[[Evidence], dict[str, Any] | None]
    recommendation: str
    reason: str
    source: str
    enough: bool = True


RULES: tuple[Rule, ...] = (
    Rule(
        "one_task",
        "sharing",
        when.one_task,
        "train it as it is",
        "there is nothing to share",
        "Caruana 1997, Multitask learning",
    ),
    Rule(
        "separate",
        "sharing",
        when.conflict,
        "do not force these tasks on one set of weights: group them (hf-multitask group), or give each weights of its "
        "own (sharing: adapter, conditioned)",
        "a step for one raises the loss of the other, and which tasks train together decides more than how",
        _GROUPS,
    ),
    Rule(
        "hard",
        "sharing",
        when.hard,
        "sharing: hard",
        "related tasks of similar size agree on what the encoder should compute, and one encoder overfits least",
        "Baxter 2000, A model of inductive bias learning; Caruana 1997, Multitask learning",
    ),
    Rule(
        "soft",
        "sharing",
        when.soft,
        "sharing: soft, if there is room for an encoder per task; else hard",
        "tasks that are related a little gain from encoders that pull each other but may differ",
        "Duong et al. 2015, Low resource dependency parsing: cross-lingual parameter sharing in a neural network "
        "parser",
    ),
    Rule(
        "conditioned",
        "sharing",
        when.conditioned,
        "sharing: conditioned, or prefix, where the backbone should stay as it is",
        "a strong backbone serves many tasks with few weights for each; small ones lose more by it",
        "Pilault et al. 2021, Conditionally adaptive multi-task learning; Lester et al. 2021, The power of scale for "
        "parameter-efficient prompt tuning",
    ),
    Rule(
        "experts",
        "sharing",
        when.experts,
        "sharing: mixture_of_experts",
        "many tasks with much data fill experts, and the gates keep apart what does not go together",
        "Ma et al. 2018, Modeling task relationships in multi-task learning with multi-gate mixture-of-experts; Gupta "
        "et al. 2022, Sparsely activated mixture-of-experts are robust multi-task learners",
    ),
    Rule(
        "auxiliary",
        "sharing",
        when.little_data,
        "if that task is the one that matters: primary_task for it, auxiliary: true for the others",
        "gains are largest where the task has little data of its own; the others then only have to help",
        "Phang et al. 2018, Sentence encoders on STILTs; Bingel & Søgaard 2017, Identifying beneficial task relations "
        "for multi-task learning in deep neural networks",
    ),
    Rule(
        "granularity",
        "sharing",
        when.granularity,
        "expect less help between tasks per text and tasks per token than within each kind, and look at each by itself",
        "few sequence labelling tasks gained from joint training, and word-level tasks belong into lower layers",
        "Martínez Alonso & Plank 2017, When is multitask learning effective?; Søgaard & Goldberg 2016, Deep multi-task "
        "learning with low level tasks supervised at lower layers",
    ),
    Rule(
        "unknown_relation",
        "sharing",
        when.unknown_relation,
        "not enough evidence for a sharing scheme; hard is the cheapest to begin with",
        "no interval of a cosine leaves out 0, or none was measured",
        _THIS_MEASUREMENT,
        enough=False,
    ),
    Rule(
        "balanced",
        "sampling",
        when.balanced,
        "task_sampling as it is: the strategies give nearly the same shares",
        "they differ by what they make of sizes, and these are similar",
        _THIS_MEASUREMENT,
    ),
    Rule(
        "temperature",
        "sampling",
        when.unbalanced,
        "task_sampling: temperature, with alpha between 0.3 and 0.75",
        "in proportion to size the smallest task hardly comes; with equal shares its rows come again and again",
        "Arivazhagan et al. 2019, Massively multilingual neural machine translation in the wild; Conneau et al. 2020, "
        "Unsupervised cross-lingual representation learning at scale",
    ),
    Rule(
        "unimax",
        "sampling",
        when.very_unbalanced,
        "task_sampling: unimax (max_passes 4), or capped",
        "no exponent is right for sizes so far apart; a bound on the passes over small datasets is",
        "Chung et al. 2023, UniMax: fairer and more effective language sampling for large-scale multilingual "
        "pretraining; Raffel et al. 2020, Exploring the limits of transfer learning (section 3.5.2)",
    ),
    Rule(
        "repeats",
        "sampling",
        when.repeats,
        "fewer passes: task_sampling: unimax with max_passes 4, or fewer steps",
        "repeated rows are nearly as good as new ones for about 4 passes, and worth little beyond 16",
        "Muennighoff et al. 2023, Scaling data-constrained language models",
    ),
    Rule(
        "no_sizes",
        "sampling",
        when.no_sizes,
        "not enough evidence for a sampling strategy",
        "how many rows there are is not known for every task",
        _THIS_MEASUREMENT,
        enough=False,
    ),
    Rule(
        "fixed_weights",
        "weighting",
        when.same_scale,
        "loss_weighting: static",
        "losses of one scale need no method that evens them out",
        _NEGATIVE_RESULTS,
    ),
    Rule(
        "scales_apart",
        "weighting",
        when.scales_apart,
        "set these weights (Task(weight=...)), or loss_weighting: normalized or uncertainty; standardize the labels of "
        "a regression",
        "the largest loss makes nearly the whole gradient, whatever the task is worth",
        "Kendall et al. 2018, Multi-task learning using uncertainty to weigh losses for scene geometry and semantics",
    ),
    Rule(
        "scale_aware",
        "weighting",
        when.scale_aware,
        "keep the loss weighting: it evens out scales",
        "it looks at each loss, and the scales differ",
        "Kendall et al. 2018, Multi-task learning using uncertainty to weigh losses for scene geometry and semantics",
    ),
    Rule(
        "no_losses",
        "weighting",
        when.no_losses,
        "not enough evidence for a loss weighting",
        "losses at the start were not measured for every task, or one is 0",
        _THIS_MEASUREMENT,
        enough=False,
    ),
    Rule(
        "tune_weights_first",
        "weighting",
        when.several,
        "tune two or three sets of fixed weights (hf-multitask sweep) before trying an adaptive method, and compare "
        "with the best of them",
        "in careful comparisons, methods that adapt weights or gradients did not beat tuned fixed weights",
        _NEGATIVE_RESULTS,
    ),
    Rule(
        "combine",
        "combination",
        when.conflict,
        "try gradient_combination: upgrad, pcgrad or cagrad against tuned fixed weights; keep it only if it wins",
        "steps then harm no task of equal weight to first order; whether that gives better models is disputed",
        "Yu et al. 2020, Gradient surgery for multi-task learning; Liu et al. 2021, Conflict-averse gradient descent; "
        "Quinton & Rey 2024, Jacobian descent for multi-objective optimization; against: " + _NEGATIVE_RESULTS,
    ),
    Rule(
        "plain_sum",
        "combination",
        when.no_conflict,
        "gradient_combination: sum",
        "no conflict was seen, and the plain sum costs one backward pass in place of one per task",
        _NEGATIVE_RESULTS,
    ),
    Rule(
        "undecided_conflict",
        "combination",
        when.undecided_conflict,
        "not enough evidence for or against a gradient combination: measure more or larger batches "
        "(gradient_conflicts), or set conflict_logging_steps",
        "the interval reaches into conflict and holds 0",
        _THIS_MEASUREMENT,
        enough=False,
    ),
    Rule(
        "noisy",
        "combination",
        when.noisy,
        "not enough evidence for or against a gradient combination: measure larger batches (gradient_conflicts)",
        "batches of these tasks disagree with each other, so that tasks look unrelated whatever they are",
        _THIS_MEASUREMENT,
        enough=False,
    ),
    Rule(
        "not_measured",
        "combination",
        when.not_measured,
        "not enough evidence for or against a gradient combination: measure conflicts (gradient_conflicts)",
        "conflicts were not measured",
        _THIS_MEASUREMENT,
        enough=False,
    ),
    Rule(
        "worse",
        "comparison",
        when.of_verdict("worse"),
        "train these tasks alone or in another group (hf-multitask group), or give them a larger share or weight",
        "their single-task baselines are better",
        _GROUPS,
    ),
    Rule(
        "deploy",
        "comparison",
        when.all_fine,
        "keep this setting",
        "it matches or beats every single-task baseline, at the cost of one model",
        _THIS_MEASUREMENT,
    ),
    Rule(
        "undecided",
        "comparison",
        when.of_verdict("undecided"),
        "not enough evidence on these tasks: more seeds, or more validation rows",
        "the interval of the difference is too wide for a verdict",
        _THIS_MEASUREMENT,
        enough=False,
    ),
    Rule(
        "not_compared",
        "comparison",
        when.not_compared,
        "not enough evidence that the tasks help each other: run hf-multitask compare",
        "what is measured before a training is a hint; only baselines show whether tasks gain",
        _GROUPS,
        enough=False,
    ),
)
"""All rules, by topic; those that hold are shown in this order."""
