"""The pass over rows of logits compiled for this machine's CPU, where a C++ compiler is at hand.

`cpp/` does what the chunks in `passing` and `top_k_kl` do, in a quarter to a half of the time: a
row's numbers stay in the core's cache, and no operation stores what the next reads. It is compiled
once a process, in some 3 seconds of a core, for the very processor it runs on; nothing of it is
kept, so that no other processor meets it. Where there is no compiler, the chunks do the work.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from flagscale.post_training.divergences.rows import Formula

# Below this many columns, which is no vocabulary of a language model, compiling does not pay.
MIN_COLUMNS = 8192
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
_TIMEOUT_SECONDS = 120
_KINDS = {
    name: number
    for number, name in enumerate(
        ("ForwardKL", "ReverseKL", "JensenShannon", "SkewKL", "TotalVariation")
    )
}
_DTYPES = (torch.float32, torch.bfloat16)
_log = logging.getLogger(__name__)


class _Logits(ctypes.Structure):
    """As in `cpp/rows.h`."""

    _fields_ = (
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("student_stride", ctypes.c_int64),
        ("teacher_stride", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("student_bfloat16", ctypes.c_int32),
        ("teacher_bfloat16", ctypes.c_int32),
        ("temperature", ctypes.c_float),
    )


def serves(student_nv: torch.Tensor, teacher_nv: torch.Tensor) -> bool:
    """Whether such logits are passed over by the compiled form; compiles it at the first ones."""
    return (
        student_nv.size(-1) >= MIN_COLUMNS
        and all(
            logits.device.type == "cpu" and logits.dtype in _DTYPES and logits.stride(-1) == 1
            for logits in (student_nv, teacher_nv)
        )
        and compiled() is not None
    )


def one_pass(
    divergence: Formula,
    student_nv: torch.Tensor,
    teacher_nv: torch.Tensor,
    norms: torch.Tensor | None,
    sums: torch.Tensor | None,
    with_sums: bool,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `passing.one_pass`."""
    count = student_nv.size(0)
    normalise, add_up = norms is None, sums is None and with_sums
    norms = torch.empty(4, count) if norms is None else norms.contiguous()
    sums = torch.empty(divergence.number_of_sums, count) if sums is None else sums.contiguous()
    _each_row(
        "one_pass",
        divergence.temperature,
        student_nv,
        teacher_nv,
        ctypes.c_int32(_KINDS[type(divergence).__name__]),
        ctypes.c_float(getattr(divergence, "beta", getattr(divergence, "alpha", 0.0))),
        _address(norms),
        ctypes.c_int64(norms.stride(0)),
        _address(sums),
        ctypes.c_int64(sums.stride(0)),
        *(ctypes.c_int32(flag) for flag in (normalise, add_up, with_gradient)),
    )
    return norms, sums


def top_k_parts(
    student_nv: torch.Tensor, teacher_nv: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A slice's candidates and tails, as `top_k_kl` wants them.

    Returns:
        Tokens of the teacher's k largest logits, int64 [N, k], in order; float32 [N, 4 + 2k]: the
        tails' normalisers (teacher's, student's), and both models' logits of those tokens.
    """
    count = student_nv.size(0)
    tokens, parts = torch.empty(count, k, dtype=torch.int64), torch.empty(count, 4 + 2 * k)
    _each_row(
        *("top_k_parts", temperature, student_nv, teacher_nv),
        *(ctypes.c_int64(k), _address(tokens), _address(parts)),
    )
    return tokens, parts


def top_k_write(
    student_nv: torch.Tensor,
    temperature: float,
    tokens_nk: torch.Tensor,
    factor_n: torch.Tensor,
    gradient_nk: torch.Tensor,
    log_z_n: torch.Tensor,
) -> None:
    """Overwrite the student's logits with the gradient of `top_k_kl`, times `T`.

    Args:
        student_nv: [N, V], this rank's slice of the vocabulary.
        temperature: divides the logits.
        tokens_nk: of this slice, those that have a gradient of their own.
        factor_n: float32; what the others' probabilities are multiplied by.
        gradient_nk: float32, at those tokens.
        log_z_n: float64; logsumexp of the whole row's scaled logits.
    """
    arrays = [part.contiguous() for part in (tokens_nk, factor_n, gradient_nk, log_z_n)]
    k = ctypes.c_int64(tokens_nk.size(1))
    _each_row("top_k_write", temperature, student_nv, student_nv, k, *map(_address, arrays))


def _each_row(
    name: str,
    temperature: float,
    student_nv: torch.Tensor,
    teacher_nv: torch.Tensor,
    *arguments: Any,  # noqa: ANN401 - of ctypes, as the function wants them
) -> None:
    """Call a function of the library for all rows, on as many threads as torch takes.

    What a row gives does not depend on their number.
    """
    function, count = getattr(compiled(), name), student_nv.size(0)
    logits = _Logits(
        *(student_nv.data_ptr(), teacher_nv.data_ptr()),
        *(student_nv.stride(0), teacher_nv.stride(0), student_nv.size(1)),
        *(part.dtype == torch.bfloat16 for part in (student_nv, teacher_nv)),
        temperature,
    )

    def rows(begin: int, end: int) -> None:
        function(ctypes.byref(logits), ctypes.c_int64(begin), ctypes.c_int64(end), *arguments)

    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        rows(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    # Threads of this call alone: a pool that is kept would be dead in a process that is forked.
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(rows, *pair) for pair in itertools.pairwise(bounds[1:])]
        rows(*bounds[:2])
        for other in others:
            other.result()


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The library, compiled when it is first asked for; None where that cannot be done."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        _log.info("losses on the CPU: no C++ compiler is at hand; some two times slower without")
        return None
    start = time.monotonic()
    try:
        library = compile_with(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning("losses on the CPU: in chunks, since %s did not compile: %s", compiler, reason)
        return None
    _log.info("losses on the CPU: compiled by %s in %.1f s", compiler, time.monotonic() - start)
    return library


def compile_with(compiler: str) -> ctypes.CDLL:
    """The library made by a compiler, for this processor; nothing stays on disk.

    Args:
        compiler: a command, with options of its own.

    Raises:
        OSError: there is no such command, or what it made cannot be loaded.
        subprocess.SubprocessError: it failed, or took over two minutes.
    """
    sources = sorted(map(str, (Path(__file__).parent / "cpp").glob("*.cpp")))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder) / "cpu_kernel.so"
        subprocess.run(  # noqa: S603 - the user's own compiler
            [*compiler.split(), *_FLAGS, *sources, "-o", str(library)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
        return ctypes.CDLL(str(library))
