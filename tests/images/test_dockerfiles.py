"""What the Dockerfiles say, without building them, and what pip is told to install."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
Instruction = tuple[str, str]


def instructions(file: Path) -> list[Instruction]:
    """(instruction, arguments), continued lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (first, rest)
        for first, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def stages(file: Path) -> list[list[Instruction]]:
    """Instructions from each FROM to the next."""
    found: list[list[Instruction]] = []
    for instruction in instructions(file):
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, IMAGES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_three() -> None:
    assert [file.stem for file in DOCKERFILES] == ["cpu", "gpu", "mlflow"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.stem)
def test_the_result_runs_as_a_user_and_installs_nothing(file: Path) -> None:
    assert len(stages(file)) > 1
    last = stages(file)[-1]
    names = [name for name, _ in last]
    assert ("USER", "1000:1000") in last
    assert not {"HEALTHCHECK", "ENTRYPOINT", "ADD"} & {name for name, _ in instructions(file)}
    # What comes after the user's line is not done by root; before it nothing is fetched.
    for name, text in last:
        assert name != "RUN" or not re.search(r"\b(apt-get|pip|curl|wget|git)\b", text)
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "COPY")
    label = next(text for name, text in last if name == "LABEL")
    assert 'org.opencontainers.image.version="${VERSION}"' in label


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.stem)
def test_what_is_copied_exists_and_is_sent_to_the_builder(file: Path) -> None:
    sent = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for name, text in instructions(file):
        if name == "COPY" and not text.startswith("--from"):
            for source in text.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(Path(source).is_relative_to(given) for given in sent), source


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.stem)
def test_every_argument_is_used_and_every_stage_named(file: Path) -> None:
    text = "\n".join(f"{name} {rest}" for name, rest in instructions(file))
    for argument in re.findall(r"^ARG (\w+)", text, re.MULTILINE):
        # pip reads its own from the environment.
        assert re.search(rf"\$\{{?{argument}\b", text) or argument == "PIP_NO_CACHE_DIR", argument
    known = {"${BASE_IMAGE}"}
    for stage in stages(file):
        base, _, name = stage[0][1].partition(" AS ")
        assert base in known
        known.add(name)
    for source in re.findall(r"--from=(\w+)", text):
        assert source in known
    assert re.search(r"^ARG BASE_IMAGE=\S+:\S+$", text, re.MULTILINE)
    assert ":latest" not in text


def test_build_passes_what_make_is_given(tmp_path: Path) -> None:
    """The builder's command, by a builder that writes it down."""
    builder = tmp_path / "builder"
    builder.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/arguments\n')
    builder.chmod(0o755)
    subprocess.run(
        [IMAGES / "build.sh", "cpu", "gpu"],
        env={
            "PATH": "/usr/bin:/bin",
            "BIN": str(Path(sys.executable).parent),
            "BUILDER": str(builder),
            "REGISTRY": "registry.example/team/",
            "BASE_IMAGE": "debian:12",
            "BUILD_OPTIONS": "--network host",
        },
        check=True,
    )
    arguments = (tmp_path / "arguments").read_text().splitlines()
    from components.image import VERSION

    name = f"registry.example/team/flagscale-distillation:{VERSION}"
    assert f"{name}-cpu" in arguments
    assert f"{name}-gpu" in arguments
    assert arguments.count("BASE_IMAGE=debian:12") == 1  # the GPU image has a base of its own
    assert arguments.count("--network") == arguments.count("host") == 2
    assert any(text.startswith("SOURCES=sources ") for text in arguments)


PROJECT = {
    "dependencies": ["torch==2.13.0", "nvidia-modelopt==0.43.0", "numpy"],
    "optional-dependencies": {"gpu": ["transformer-engine[pytorch]>=2.9"], "cluster": ["s3fs"]},
}
LOCK = ["torch==2.13.0", "nvidia-modelopt==0.43.0", "nvidia-ml-py==13.6", "numpy==2.4.6", ""]
BASE = {
    "torch": "2.10.0a0+b558c98",
    "pytorch_triton": "3.5.0",
    "transformer_engine": "2.10.0",
    "nvidia-cublas": "13.1",
    "nvidia-modelopt": "0.39.0",
    "numpy": "2.1.0",
}


def test_on_a_plain_base_the_lock_holds_whole() -> None:
    module = load("requirements")
    assert module.requirements(PROJECT, ["cluster"], keep_base=False) == [
        "torch==2.13.0",
        "nvidia-modelopt==0.43.0",
        "numpy",
        "s3fs",
    ]
    assert module.constraints(LOCK, BASE, keep_base=False) == sorted(filter(None, LOCK))


def test_on_nvidias_base_its_torch_and_transformer_engine_stay() -> None:
    module = load("requirements")
    wanted = module.requirements(PROJECT, ["gpu", "cluster"], keep_base=True)
    assert wanted == ["nvidia-modelopt==0.43.0", "numpy", "s3fs"]
    assert module.constraints(LOCK, BASE, keep_base=True) == [
        "numpy==2.4.6",
        "nvidia-cublas==13.1",
        "nvidia-ml-py==13.6",
        "nvidia-modelopt==0.43.0",
        "pytorch-triton==3.5.0",
        "torch==2.10.0a0+b558c98",
        "transformer-engine==2.10.0",
    ]


def test_every_dependency_of_the_images_is_pinned(tmp_path: Path) -> None:
    command = [sys.executable, IMAGES / "requirements.py", tmp_path, "--extras", "cluster"]
    subprocess.run(command, check=True)
    module = load("requirements")
    pins = {module.normal(line) for line in (tmp_path / "constraints.txt").read_text().splitlines()}
    wanted = (tmp_path / "requirements.txt").read_text().splitlines()
    assert {module.normal(line) for line in wanted} <= pins
    assert "setuptools" in pins


def install(folder: Path, name: str, version: str) -> None:
    """What importlib.metadata takes for an installed package."""
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("torch_in", "engine", "complaint"),
    [
        ("base", "2.10.0+769ed778", None),
        ("venv", "2.10.0", "torch 9.9a0 was installed over the base's"),
        ("base", "2.8.0", "the base has transformer-engine 2.8.0: want"),
        ("base", None, "the base has no transformer-engine"),
    ],
)
def test_a_base_that_does_not_serve_ends_the_build(
    tmp_path: Path, torch_in: str, engine: str | None, complaint: str | None
) -> None:
    base, environment = tmp_path / "base", tmp_path / "venv"
    install(tmp_path / torch_in / "lib", "torch", "9.9a0")
    if engine:
        install(base / "lib", "transformer_engine", engine)
    import packaging

    code = (
        "import sys; sys.path[:0] = sys.argv[3:6]; sys.path = [p for p in sys.path "
        "if 'site-packages' not in p]; sys.path.append(sys.argv[6])\n"
        "import importlib.util, pathlib\n"
        "spec = importlib.util.spec_from_file_location('check', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print('; '.join(module.problems(pathlib.Path(sys.argv[2]))))\n"
    )
    # `packaging` alone, by a link: this environment has a torch of its own.
    only = tmp_path / "only"
    only.mkdir()
    (only / "packaging").symlink_to(Path(packaging.__path__[0]))
    places = [base / "lib", environment / "lib", only]
    command = [sys.executable, "-S", "-c", code, IMAGES / "check_base.py", environment]
    result = subprocess.run(
        [*map(str, command), *map(str, places), str(only)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    if complaint is None:
        assert result.stdout.strip() == ""
    else:
        assert complaint in result.stdout


NO_NUMPY = "def from_numpy(array): raise RuntimeError('Numpy is not available')"
LOADER = "transformer_engine_torch.so: undefined symbol: _ZN3c104cuda"


@pytest.mark.parametrize(
    ("module", "code", "complaint"),
    [
        ("torch.py", NO_NUMPY, "torch takes numpy: RuntimeError: Numpy is not available"),
        (
            "transformer_engine/pytorch.py",
            f"raise ImportError({LOADER!r})",
            f"transformer engine loads: ImportError: {LOADER}",
        ),
        (
            "megatron/core/extensions/transformer_engine.py",
            "HAVE_TE = False",
            "megatron takes transformer engine: ImportError: Megatron-Core goes on as if",
        ),
    ],
    ids=["numpy", "transformer-engine", "megatron"],
)
def test_what_does_not_load_ends_the_build(
    tmp_path: Path, module: str, code: str, complaint: str
) -> None:
    """All but one of them is there and loads."""
    done = check_loading(tmp_path, {module: code})
    assert done.stdout.count("not so") == 1
    assert f"not so: {complaint}" in done.stdout


def test_what_loads_together_passes(tmp_path: Path) -> None:
    assert check_loading(tmp_path, {}).stdout.strip() == "[]"


def test_a_build_has_no_driver(tmp_path: Path) -> None:
    text = "libcuda.so.1: cannot open shared object file: No such file or directory"
    done = check_loading(
        tmp_path, {"transformer_engine/pytorch.py": f"raise ImportError({text!r})"}
    )
    assert done.stdout.strip() == "[]"
    assert "not tried here, for want of a driver: not so: transformer engine loads" in done.stderr


def check_loading(folder: Path, changed: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Ask whether planted packages load: the base's own are not here."""
    modules = {
        "torch.py": "def from_numpy(array): return array",
        "transformer_engine/pytorch.py": "",
        "transformer_engine/__init__.py": "",
        "megatron/core/__init__.py": "",  # or it is looked for where megatron.core is installed
        "megatron/core/extensions/__init__.py": "",
        "megatron/core/extensions/transformer_engine.py": "HAVE_TE = True",
    }
    for name, code in {**modules, **changed}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    ask = (
        "import sys, importlib.util; sys.path.insert(0, sys.argv[2])\n"
        "spec = importlib.util.spec_from_file_location('check', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.failures())\n"
    )
    command = [sys.executable, "-c", ask, str(IMAGES / "check_base.py"), str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def test_nvidias_switch_to_tf32_is_off_in_the_image() -> None:
    settings = ("ENV", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 NVIDIA_TF32_OVERRIDE=0")
    assert settings in stages(IMAGES / "gpu.Dockerfile")[-1]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.stem)
def test_the_pins_hold_for_what_builds_packages_too(file: Path) -> None:
    """A newer pip takes them from another variable, and what it does not know it ignores."""
    text = file.read_text()
    if "--only-binary :all:" in text:
        return  # nothing is built
    pins = re.findall(r"PIP_CONSTRAINT=(\S+)", text)
    assert pins
    assert re.findall(r"PIP_BUILD_CONSTRAINT=(\S+)", text) == pins


def test_a_layer_of_its_own_has_what_the_environment_lacks() -> None:
    report = {"install": [{"metadata": {"name": name, "version": "1.0"}} for name in ("b", "a")]}
    assert load("missing").pins(report) == ["a==1.0", "b==1.0"]
    assert load("missing").pins({"install": []}) == []
