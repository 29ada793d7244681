"""What of a platform a run may change: the parameters `where_...`, and what a recipe gets there."""

from __future__ import annotations

from components.image import image
from flagscale.errors import UserError
from flagscale.recipe import Recipe
from flagscale.run_values.kubernetes_names import check_image
from flagscale.secrets import hide_in_urls
from pipelines.parameters import Parameter
from pipelines.platform import Platform
from pipelines.pods import Pods

KINDS = ("data", "models", "training")


def parameters(platform: Platform, recipe: Recipe) -> list[Parameter]:
    """What a run may change of a platform.

    Raises:
        UserError: an image's name, of the environment, is wrong.
    """
    found = []
    for kind in KINDS:
        pods = pods_of(platform, recipe, kind)
        steps = type(platform.steps).model_fields[kind].description
        found.append(Parameter(f"where_{kind}_image", _image(platform, pods), f"image of {steps}"))
        if kind != "data":
            # As text: KFP's driver takes an integer for nothing, and the pod gets no accelerators.
            count = str(pods.accelerator_count)
            text = f"{pods.accelerator_type} a pod of {steps}"
            found.append(Parameter(f"where_{kind}_accelerator_count", count, text))
        text = 'labels of the nodes, e.g. {"pool": "h100"}, of ' + str(steps)
        found.append(Parameter(f"where_{kind}_node_selector", dict(pods.node_selector), text))
        tolerations = [t.model_dump(exclude_none=True) for t in pods.tolerations]
        text = f"taints, as in Kubernetes, of {steps}"
        found.append(Parameter(f"where_{kind}_tolerations", tolerations, text))
    if platform.shared is not None and platform.shared.claim is not None:
        text = f"PersistentVolumeClaim mounted at {platform.shared.mount_path}"
        found.append(Parameter("where_volume_claim", platform.shared.claim, text))
    if platform.mlflow.secret is not None:
        text = "Secret with keys tracking-uri and, if the server asks, username and password"
        found.append(Parameter("where_mlflow_secret", platform.mlflow.secret, text))
    return found


def location(platform: Platform | None) -> str | None:
    """Folder or URL that steps share; None where there is none."""
    return platform.shared.location if platform and platform.shared else None


def pods_of(platform: Platform, recipe: Recipe, kind: str) -> Pods:
    """The platform's pods of a kind, with no more accelerators than the recipe wants."""
    pods: Pods = getattr(platform.steps, kind)
    wanted = recipe.resources.accelerator_count
    if kind != "training" or wanted is None:
        return pods
    return pods.model_copy(update={"accelerator_count": min(wanted, pods.accelerator_count)})


def _image(platform: Platform, pods: Pods) -> str:
    given = platform.images.gpu if pods.accelerator_count else platform.images.cpu
    if given is not None:
        return given
    name = image(pods.accelerator_count)
    kind = "GPU" if pods.accelerator_count else "CPU"
    try:
        return check_image(name)
    except ValueError as error:
        raise UserError(
            f"image {hide_in_urls(name)!r}, of FLAGSCALE_{kind}_IMAGE or FLAGSCALE_REGISTRY: "
            f"{error}"
        ) from None
