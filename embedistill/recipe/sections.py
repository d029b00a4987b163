"""The settings a recipe may have: strict models, each with its description. This module imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from embedistill.choices import By, Dtype, Encodes, Fault, IndexKind, Kind, OnBad, Storage
from embedistill.files import fingerprint
from embedistill.recipe.training import LIVE, TrainingSection
from embedistill.recipe.values import Count, Positive, Section, Share

AGREEMENT = "agreement"
KNOWN_ITEM = "known-item"
AFTERWARDS = ("evaluation", "search")  # sections that a run may be given anew when its student is there


class TeacherSection(Section):
    """The model to distil."""

    model: str = Field(description="A folder, or a model id such as sentence-transformers/all-mpnet-base-v2.")
    revision: str | None = Field(None, description="Commit, tag or branch of the model on the Hub.")
    prompts: dict[Kind, str] = Field(
        {},
        description="What stands before a query, a document, and any other text, in place of what the model's own "
        "configuration says: {query: 'query: ', document: 'passage: ', plain: 'query: '} for E5.",
    )
    api: str | None = Field(
        None,
        description="Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1, that has the model.",
    )
    api_key_variable: str = Field("OPENAI_API_KEY", description="Environment variable with the endpoint's key.")
    dtype: Dtype = Field(
        "auto", description="float32, bfloat16, or auto: bfloat16 where its matrix products are measured faster."
    )


class EncodingSection(Section):
    """How the teacher's embeddings are made, kept, and judged."""

    storage: Storage = Field("float16", description="Number format in the cache: float32, float16, bfloat16 or int8.")
    drop: list[Fault] = Field(
        ["not-finite", "zero-norm"],
        description="Faults of a vector that keep its text from training: not-finite, zero-norm, cut (its text was "
        "longer than the teacher sees), equal (another text has the same vector), outlier (its neighbours are far). "
        "All are counted and reported.",
    )
    engine: Literal["local", "ray"] = Field("local", description="local, or ray: a Ray cluster encodes.")
    workers: Count = Field(1, description="Workers of the Ray cluster.")
    cores: Count = Field(1, description="Cores of a Ray worker.")
    gpus: Annotated[float, Field(ge=0)] = Field(0.0, description="GPUs of a Ray worker, or a share of one.")
    store: str | None = Field(
        None,
        description="Where Ray workers keep the cache: s3://..., or a folder all see; default: the cache's folder.",
    )

    @field_validator("drop")
    @classmethod
    def _drops_what_cannot_be_trained_on(cls, drop: list[Fault]) -> list[Fault]:
        if not {"not-finite", "zero-norm"} <= set(drop):
            raise ValueError("not-finite and zero-norm among them: such a vector cannot be trained on")
        return drop


class SelectSection(Section):
    """Which records of the corpus are used."""

    size: Count | None = Field(None, description="At most this many records, training and held out; default: all.")
    by: By = Field(
        "random",
        description="How they are selected: random, or evenly: by source, by length (a share for each "
        "doubling), or by diversity (in clusters of cheap embeddings); or by cost: fewer of the long ones, which cost "
        "more (optimal allocation).",
    )


class CorpusSection(Section):
    """The texts to distil on."""

    source: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="A .txt, .csv or .jsonl file (.gz too), a .parquet file, a folder of them, "
        "hf:org/dataset[:config][:split][#text column], docstrings:[package,package], or a list of such."
    )
    text_column: str = Field("text", description="Column with the text.")
    kind: Literal["document", "query"] = Field(
        "document",
        description="What its texts are to a teacher with a prompt for each: documents, or queries, such as those of a "
        "query encoder.",
    )
    pairs: str | None = Field(
        None,
        description="A file of pairs beside the corpus, with the columns anchor, positive and, if there is one, "
        "negative: its positives are texts, its anchors their queries.",
    )
    query_column: str | None = Field(
        None, description="Column with a short text that should find the text: a title, a question. Trained on as well."
    )
    source_column: str = Field(
        "source",
        description="Column that says where a row is from, for select.by: source and the report; where a file has no "
        "column source, its name does.",
    )
    bad_rows: OnBad = Field(
        "error", description="A row whose text is missing, no string or too long: error, or skip and count it."
    )
    min_characters: Count = Field(3, description="Shorter texts are left out.")
    drop_damaged: bool = Field(False, description="Leave out texts that were decoded wrongly, as ftfy finds.")
    language: Annotated[str, Field(pattern=r"^[a-z]{2}$")] | None = Field(
        None, description="Leave out texts of another language than this, such as en, as langid finds."
    )
    near_duplicates: Literal["keep", "drop"] = Field(
        "keep", description="Texts that are nearly the same as another, by MinHash: keep, or drop all but one."
    )
    max_characters: Count = Field(100_000, description="A longer text is a bad row.")
    select: SelectSection = SelectSection()
    holdout: Share = Field(0.05, description="Share of the records that is never trained on, for evaluation.")

    @model_validator(mode="after")
    def _finds_documents(self) -> CorpusSection:
        if self.kind == "query" and self.query_column:
            raise ValueError("no query_column beside kind: query, as a query has none of its own")
        if self.kind == "query" and any(source.startswith("docstrings:") for source in self.sources):
            raise ValueError("kind: document for docstrings, which have queries of their own")
        return self

    @property
    def sources(self) -> list[str]:
        """All that is read: the pairs, where there are such, and the sources."""
        sources = [self.source] if isinstance(self.source, str) else self.source
        return [*([self.pairs] if self.pairs else []), *sources]


def _read_count(value: Any) -> Any:
    """Return 14_500_000 for "14.5M"."""
    factor = {"K": 1e3, "M": 1e6, "B": 1e9}.get(value[-1:].upper()) if isinstance(value, str) else None
    try:
        return round(float(value[:-1]) * factor) if factor else value
    except ValueError:
        return value


class ShapeSection(Section):
    """The sizes of a transformer that is made of the teacher's weights."""

    layers: Count | list[int] | None = Field(
        None, description="How many layers to keep, the best of them found by a search; or which, counted from 0."
    )
    hidden_size: Count | None = Field(None, description="Width of the hidden states; default: the teacher's.")
    num_attention_heads: Count | None = Field(
        None, description="Heads; must divide hidden_size; default: the teacher's, or the most that divide it."
    )
    intermediate_size: Count | None = Field(
        None, description="Neurons of a feed-forward part; default: the teacher's, narrowed as hidden_size is."
    )
    vocabulary_size: Count | None = Field(
        None, description="Pieces of the tokenizer to keep, those the corpus uses most; default: all."
    )


class AssistantSection(ShapeSection):
    """A student that is distilled first, and that the student proper is then made of."""

    share: Share = Field(0.5, description="Its share of the training's epochs or minutes.")

    @model_validator(mode="after")
    def _has_layers(self) -> AssistantSection:
        if self.layers is None:
            raise ValueError("layers, a number or a list")
        return self


class StudentSection(ShapeSection):
    """What the teacher is distilled into."""

    origin: str = Field(
        "teacher",
        alias="from",
        description="What it is made of: teacher (its own weights), static (token vectors, no layers), or a model id.",
    )
    embedding_size: Count | None = Field(
        None, description="Dimension of the student's embeddings: PCA of the teacher's; default: the teacher's own."
    )
    max_parameters: Annotated[Count | None, BeforeValidator(_read_count)] = Field(
        None, description="Choose depth, width and vocabulary for at most so many parameters, such as 14.5M."
    )
    max_mb_int8: Positive | None = Field(None, description="Choose them for at most so many MB in int8.")
    speedup: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Choose them to encode so many times as fast as the teacher."
    )
    via: AssistantSection | None = Field(
        None, description="Distil in two steps from one cache: first into an assistant of these sizes."
    )

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that were given, by setting."""
        names = ("max_parameters", "max_mb_int8", "speedup")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> StudentSection:
        sizes = {name for name in ShapeSection.model_fields if getattr(self, name) is not None}
        given = sizes | set(self.budgets)
        if self.via and self.budgets:
            raise ValueError("layers beside via: a budget chooses among what is made of the teacher itself")
        if self.origin == "teacher":
            if (self.layers is None) == (not self.budgets) or len(self.budgets) > 1 or (self.budgets and sizes):
                raise ValueError("layers, or one of max_parameters, max_mb_int8 and speedup, and no size beside it")
        else:
            allowed = {"vocabulary_size"} if self.origin == "static" else set()
            extra = sorted((given | ({"via"} if self.via else set())) - allowed)
            if extra:
                raise ValueError(
                    f"no {', '.join(extra)} with from: {self.origin}: only a teacher's own weights are cut"
                )
        return self


class EvaluationSection(Section):
    """What teacher and student are compared on."""

    tasks: list[Annotated[str, Field(pattern=r"^(\w[\w.-]*|.+\.jsonl(\.gz)?)$")]] = Field(
        [AGREEMENT, KNOWN_ITEM],
        min_length=1,
        description=f"{AGREEMENT} (with the teacher, on held-out texts), {KNOWN_ITEM} (FAISS retrieval of held-out "
        "records by their query), names of sets: STSBenchmark, STS12, SICK-R, SciFact, ..., or .jsonl files.",
    )
    data: str | None = Field(
        None,
        description="Folder with sts/NAME.jsonl, retrieval/NAME/, classification/, clustering/ and pairs/; default: "
        "the Hub, for STS sets.",
    )
    missing: OnBad = Field("error", description="A task whose data cannot be had: error, or skip and say so.")
    baselines: list[str] = Field([], description="Models to measure beside teacher and student.")
    margin: Share | None = Field(
        None,
        description="PASS when retention is surely above 1 - margin, FAIL when below; default: no verdict.",
    )
    segment_margin: Share | None = Field(
        None, description="FAIL as well where a part of a task surely loses more; default: twice the margin."
    )
    index: IndexKind = Field("flat", description="FAISS index that retrieval is measured with.")
    documents: Encodes = Field(
        "student",
        description="Who encodes the documents of retrieval tasks: the student, or the teacher, whose index stays as "
        "it is; then the student's queries on these are judged.",
    )
    misspelt: bool = Field(False, description="Score teacher and student also on the tasks with typing errors.")
    resamples: Annotated[int, Field(ge=100)] = Field(10_000, description="Bootstrap resamples of an interval.")

    @model_validator(mode="after")
    def _judges_segments_of_what_is_judged(self) -> EvaluationSection:
        if self.segment_margin is not None and self.margin is None:
            raise ValueError("segment_margin beside a margin, without which there is no verdict")
        return self


class SearchSection(Section):
    """The FAISS index of the corpus that a run ends with."""

    question: str = Field(description="Answered from the index when the run is done.")
    results: Count = Field(3, description="How many results are shown.")


class Recipe(Section):
    """A whole recipe. `load_recipe` makes one of a name or a file."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = Field(description="Name of the run's folder under runs/.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="Seed of selection, batches and bootstrap.")
    teacher: TeacherSection
    corpus: CorpusSection
    student: StudentSection
    encoding: EncodingSection = EncodingSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    search: SearchSection | None = Field(None, description="Build a FAISS index of the corpus and answer a question.")

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, name: str) -> str:
        if name in {".", ".."}:
            raise ValueError("must name a folder")
        return name

    @model_validator(mode="after")
    def _runs_where_it_can(self) -> Recipe:
        if self.teacher.api and self.encoding.engine != "local":
            raise ValueError(
                "teacher.api with encoding.engine=ray: an endpoint spreads its work by itself; use engine=local"
            )
        return self

    @model_validator(mode="after")
    def _searches_documents(self) -> Recipe:
        if self.search and self.corpus.kind == "query":
            raise ValueError("search: null beside corpus.kind: query, as an index is of documents")
        return self

    @model_validator(mode="after")
    def _shows_its_insides(self) -> Recipe:
        live = sorted({name for _, _, phase in self.training.phases for name in phase.objectives.used} & LIVE)
        student = self.student
        cut = student.origin == "teacher" and not student.budgets and student.vocabulary_size is None
        if live and not (cut and student.via is None):
            raise ValueError(
                f"training.objectives.{live[0]} with a student that is cut out of the teacher itself and has all of "
                "its vocabulary: student.layers, no budget, via or vocabulary_size"
            )
        return self

    @property
    def fingerprint(self) -> str:
        """The sha256 of what makes its student: all settings but the name and those of what comes afterwards.

        Those at their defaults do not count, so that it stays the same when others are added.
        """
        return fingerprint(self.model_dump(by_alias=True, exclude_defaults=True, exclude={"name", *AFTERWARDS}))
