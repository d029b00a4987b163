"""The students of a run before they are trained: what is planned, what it will cost, and what it is made of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from embedistill.architectures import Sizes, read_config, with_sizes
from embedistill.files import written_aside
from embedistill.forecast import Forecast, compare_forecast, forecast
from embedistill.material import Material
from embedistill.outlook import check_pieces, plan_section, plan_student
from embedistill.progress import note
from embedistill.recipe import Recipe
from embedistill.stages import Stages
from embedistill.student.building import add_head, build_student, list_body
from embedistill.student.head import Matrix, fit_pca, project
from embedistill.student.planning import TransformerPlan
from embedistill.student.saving import save_student
from embedistill.student.static import build_static
from embedistill.teacher import LocatedModel, load
from embedistill.teaching import list_inputs

_FIT_TEXTS = 5_000


class Construction:
    """How a run's student is made of its teacher, or of another model.

    Attributes:
        plan: The sizes of a student that is cut out of its source; None: it is static, or another model's body.
        assistant_plan: Those of the assistant between teacher and student, where there is one.

    Args:
        recipe: Of the run.
        stages: Of the run, which keep what was decided.
        teacher: Its teacher.
        start: The model that the student starts from, where that is not the teacher.

    Raises:
        UsageError: The sizes cannot be had of what the student is made of.
    """

    def __init__(self, recipe: Recipe, stages: Stages, teacher: LocatedModel, start: LocatedModel | None) -> None:
        self._section, self._stages, self._teacher, self._start = recipe.student, stages, teacher, start
        self.assistant_plan, self.plan = self._plan()

    def _plan(self) -> tuple[TransformerPlan | None, TransformerPlan | None]:
        section = self._section
        if section.origin not in {"teacher", "static"}:
            return None, None
        config = read_config(self._teacher.path)
        check_pieces(section, AutoTokenizer.from_pretrained(self._teacher.path, local_files_only=True))
        if section.origin == "static":
            return None, None
        if section.budgets:
            name = f"sizes {self._teacher.weights_sha256[:12]}"
            sizes = Sizes(**self._stages.choose(name, lambda: self._choose_sizes(config)))
            note(f"Student: {sizes.layers} x {sizes.hidden_size}, {sizes.vocabulary_size:,} pieces")
            return None, TransformerPlan(sizes)
        assistant = plan_section(config, section.via, "student.via") if section.via else None
        config = with_sizes(config, assistant.sizes) if assistant else config
        return assistant, plan_section(config, section, "student")

    def _choose_sizes(self, config: dict[str, Any]) -> dict[str, int]:
        return asdict(plan_student(self._section, config, load(self._teacher)).sizes)

    def build(
        self, source: SentenceTransformer, plan: TransformerPlan | None, material: Material, folder: Path
    ) -> dict[str, Any]:
        """Build an untrained model out of a source, save it, and return which layers of the source it has."""
        section = self._section
        inputs, vectors = material.sample(source)
        size = section.embedding_size
        projection = fit_pca(vectors, size) if size and size < vectors.shape[1] else None
        counted = list_inputs(source, material.trained)
        layers: list[int] | None = None
        if plan:
            student, layers = build_student(source, plan, inputs, vectors, projection=projection, counted=counted)
        else:
            texts, targets = inputs[:_FIT_TEXTS], project(vectors[:_FIT_TEXTS], projection)
            if self._start:
                student = add_head(list_body(load(self._start)), source, texts, targets)
            else:
                pieces = section.vocabulary_size
                student = build_static(source, texts, targets, vocabulary_size=pieces, counted=counted)
        self.save(student, folder, projection, layers)
        return {"layers": layers}

    def save(
        self, student: SentenceTransformer, folder: Path, projection: Matrix | None, layers: list[int] | None
    ) -> None:
        """Save a student with its place in the teacher's space, whole or not at all."""
        space = {
            "teacher": self._teacher.name,
            "weights_sha256": self._teacher.weights_sha256,
            "from": self._section.origin,
            "layers": layers,
        }
        with written_aside(folder) as part:
            part.mkdir()
            save_student(student, part, projection, space)

    def forecast(self) -> list[Forecast]:
        """Return what teacher and student will cost, as it was first measured; nothing without a plan."""
        name = f"forecast {self._teacher.weights_sha256[:12]}"
        return TypeAdapter(list[Forecast]).validate_python(self._stages.choose(name, self._forecast))

    def _forecast(self) -> list[dict[str, Any]]:
        if not self.plan:
            return []
        teacher = load(self._teacher)
        size = self._section.embedding_size or teacher.get_embedding_dimension() or 0
        return [asdict(one) for one in forecast(teacher, {"student": self.plan.sizes}, size)]

    def compare_forecast(self, models: dict[str, SentenceTransformer]) -> list[dict[str, Any]]:
        """Return what was planned beside what is measured; nothing where nothing was."""
        planned = self.forecast()
        return compare_forecast(planned, models) if planned else []
