"""The settings of a training."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from embedistill.choices import Curve, Dtype, Phase
from embedistill.recipe.values import Count, Positive, Section, Share

LIVE = frozenset({"layers", "attention"})  # terms that look into the teacher, which then runs on the student's tokens


class CourseSection(Section):
    """A number on its way through training. A number in its place is constant."""

    start: Annotated[float, Field(ge=0)] = Field(description="At the first step.")
    end: Annotated[float, Field(ge=0)] | None = Field(None, description="At the last step; default: as at the first.")
    schedule: Curve = Field("cosine", description="How it goes from one to the other.")

    @model_validator(mode="before")
    @classmethod
    def _read_number(cls, given: Any) -> Any:
        return {"start": given} if isinstance(given, int | float) and not isinstance(given, bool) else given

    @property
    def ends(self) -> tuple[float, float]:
        """Its first and last value."""
        return self.start, self.start if self.end is None else self.end


def _term(description: str, start: float = 0.0) -> Any:
    return Field(default_factory=lambda: CourseSection(start=start), description=description)


class ObjectivesSection(Section):
    """Weights of the terms of the loss: numbers, or sections with start, end and schedule."""

    embedding: CourseSection = _term("1 - cosine to the teacher's embedding.", 1.0)
    similarity: CourseSection = _term("KL divergence of the student's in-batch similarities from the teacher's.")
    reverse_similarity: CourseSection = _term("The same the other way: the teacher's from the student's.")
    matrix: CourseSection = _term("Squared difference of in-batch similarities to the teacher's.")
    contrastive: CourseSection = _term("InfoNCE: the teacher's embedding of the text among those of the batch.")
    ranking: CourseSection = _term("Margins between nearest neighbours and other texts, as large as the teacher's.")
    pairs: CourseSection = _term("InfoNCE of queries and documents, or of corpus.pairs; false negatives masked.")
    layers: CourseSection = _term("Hidden states of the teacher's layers; the teacher runs beside the student.")
    attention: CourseSection = _term("Attention relations of the teacher's layers (MiniLMv2); as layers.")
    spread: CourseSection = _term("Orthogonality of the batch: keeps embeddings apart.")

    @property
    def used(self) -> dict[str, CourseSection]:
        """The terms that have a weight at some time."""
        return {name: value for name in type(self).model_fields if max((value := getattr(self, name)).ends) > 0}

    @model_validator(mode="after")
    def _has_a_term(self) -> ObjectivesSection:
        if not set(self.used) & {"embedding", "similarity", "reverse_similarity", "matrix", "contrastive"}:
            raise ValueError("one weight above 0 of a term that follows the teacher's embeddings")
        return self


class PhaseSection(Section):
    """A second training behind the first, on some of its texts; what is not among these settings is as in the first."""

    on: Phase = Field("pairs", description="Its texts: all, pairs, or queries.")
    share: Share = Field(0.2, description="Its share of the training's epochs, minutes and steps.")
    learning_rate: Positive = Field(2e-5, description="Its peak learning rate.")
    objectives: ObjectivesSection = Field(
        default_factory=ObjectivesSection, description="Its terms; default: embedding: 1, and on pairs, pairs: 0.1."
    )

    @model_validator(mode="before")
    @classmethod
    def _learn_pairs(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("on", "pairs") == "pairs":
            return {"objectives": {"pairs": 0.1}, **given}
        return given

    @model_validator(mode="after")
    def _has_what_its_terms_need(self) -> PhaseSection:
        if self.on == "queries" and "pairs" in self.objectives.used:
            raise ValueError("objectives without pairs, which queries alone have not, or on: pairs")
        return self


class TrainingSection(Section):
    """How the student is trained."""

    epochs: Positive = Field(3.0, description="Passes over the training texts, at most.")
    minutes: Positive | None = Field(
        None, description="Time for training, about: as many steps as fit by ten seconds of them; no more than epochs."
    )
    steps: Count | None = Field(None, description="Steps of training, at most.")
    batch_size: Annotated[int, Field(ge=2)] = Field(64, description="Texts a step, at most.")
    batch_tokens: Count | None = Field(None, description="Tokens a step, at most, as estimated; default: no bound.")
    learning_rate: Positive = Field(
        2e-4,
        description="Peak learning rate of weights that are 0.05 large, others in proportion; linear warm-up, cosine "
        "decay to zero.",
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="Share of the steps that warms up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW weight decay.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Gradients are clipped to this norm; 0: not.")
    objectives: ObjectivesSection = Field(default_factory=ObjectivesSection)
    balance: bool = Field(
        False, description="Divide each term by its measured gradient norm: weights are ratios of gradients."
    )
    temperature: CourseSection | Literal["learned"] = Field(
        default_factory=lambda: CourseSection(start=0.05),
        description="Of the terms similarity, reverse_similarity, contrastive and pairs: a number, a section with "
        "start, end and schedule, or learned, by contrastive and pairs.",
    )
    matryoshka: list[Count] = Field(
        [],
        description="Numbers of first dimensions that every term looks at beside all of them, such as 384 and 128; "
        "default: none.",
    )
    neighbours: Annotated[int, Field(ge=0)] = Field(
        0, description="Put one of so many nearest texts, by the teacher, beside each text of a batch; 0: none."
    )
    curriculum: Literal["none", "length", "queries-last", "centre", "error"] = Field(
        "none",
        description="Easy texts first: short ones (length), documents (queries-last), those near the centre of their "
        "cluster (centre), or those that the untrained student is near its teacher on (error).",
    )
    layer_pairs: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]] = Field(
        [],
        description="Layers of student and teacher, from 0, that the terms layers and attention compare; default: the "
        "upper half of the student's, each with the one it was made of, the last with the last.",
    )
    relation_heads: Count = Field(12, description="Heads of the attention term; must divide both widths.")
    checkpoint_steps: Count = Field(100, description="Steps between checkpoints: what a kill can cost.")
    dev_size: Annotated[int, Field(ge=0)] = Field(
        256,
        description="Texts kept out of training, a twentieth at most, to watch the student on: its best weights are "
        "kept; 0: the last ones are.",
    )
    dev_steps: Count | None = Field(None, description="Steps between looks at them; default: a tenth of all.")
    dev_task: str | None = Field(
        None,
        description="A set that these looks report on as well, such as STSBenchmark.dev in evaluation.data.",
    )
    then: PhaseSection | None = Field(None, description="A second training, on pairs or queries, behind the first.")
    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(
        [], description="Trackers that follow the training."
    )
    dtype: Dtype = Field("auto", description="As teacher.dtype, for the student's training.")

    @field_validator("temperature")
    @classmethod
    def _is_warm(cls, temperature: CourseSection | str) -> CourseSection | str:
        if isinstance(temperature, CourseSection) and min(temperature.ends) <= 0:
            raise ValueError("above 0")
        return temperature

    @model_validator(mode="after")
    def _is_of_use(self) -> TrainingSection:
        terms = {term for _, _, phase in self.phases for term in phase.objectives.used}
        if self.temperature == "learned" and not terms & {"contrastive", "pairs"}:
            raise ValueError("objectives.contrastive or objectives.pairs, for temperature: learned to learn from")
        needs = {
            "layer_pairs": (bool(terms & LIVE), "objectives.layers or objectives.attention"),
            "relation_heads": ("attention" in terms, "objectives.attention"),
            **dict.fromkeys(("dev_steps", "dev_task"), (self.dev_size > 0, "dev_size above 0")),
        }
        for name, (is_there, what) in needs.items():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if not is_there and getattr(self, name) != default:
                raise ValueError(f"{what}, without which {name} does nothing")
        return self

    @property
    def phases(self) -> list[tuple[Phase, float, TrainingSection]]:
        """The trainings one after the other: on which texts, for what share of the time, and how."""
        if self.then is None:
            return [("all", 1.0, self)]
        changed = {"learning_rate": self.then.learning_rate, "objectives": self.then.objectives}
        second = self.model_copy(update=changed)
        return [("all", 1 - self.then.share, self), (self.then.on, self.then.share, second)]

    @model_validator(mode="after")
    def _is_tracked_by_what_is_there(self) -> TrainingSection:
        missing = [name for name in self.report_to if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"report_to with {', '.join(missing)} installed: pip install {' '.join(missing)}")
        return self
