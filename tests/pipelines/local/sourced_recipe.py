"""A recipe of one training step, with a teacher, a text and a student to choose."""

from flagscale.recipe import Recipe


def recipe(teacher: object, source: object = "python-docs", **student: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "teacher": {"source": str(teacher)},
            "student": student or {"num_layers": 2},
            "data": {"source": str(source)},
            "training": {"train_iters": 1, "lr": 1e-3},
        }
    )
