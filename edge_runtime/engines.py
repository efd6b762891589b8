"""The two engines behind one interface: a program bound to arrays, run again and again.

program = load_engine("onnxruntime", threads=2).load(bundle, "decode")
step = program.bind(inputs, outputs)   # name -> array; kept, not copied
inputs["tokens"][0] = 17
step()                                 # reads `inputs`, writes `outputs`

Arrays of a port with a `tokens_axis` may be shorter there, all by the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from edge_runtime import denormals
from edge_runtime.bundle import Bundle
from edge_runtime.errors import BundleError, MissingPartError
from edge_runtime.memory import return_freed_memory
from edge_runtime.processor import cuts_sums, features, usable_cores
from protos import manifest_pb2 as pb

Array = NDArray[Any]
ENGINES = ("onnxruntime", "executorch")
# An input, true unless it is bound, of an ONNX graph that is two programs.
EVERY_OUTPUT = "every_output"


class Program(Protocol):
    """A loaded program."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """A call that reads `inputs` and writes `outputs` in place, as they are at that moment.

        Raises:
            BundleError: an array is missing, or has another shape or dtype than the program.
        """


class Engine(Protocol):
    """Loads programs."""

    name: str

    def library(self) -> Any:
        """What loads programs, imported if it was not yet."""

    def load(
        self, bundle: Bundle, program: str, *, packed: bool = True, unsigned: bool | None = None
    ) -> Program:
        """Checks the files of `program` against the manifest and loads it.

        Args:
            packed: whether the engine may copy the weights into an order of its own, for speed.
            unsigned: whether to load its form with unsigned weights, if it has one (default: if
                this processor needs that to be exact).
        """


def load_engine(name: str, *, threads: int | None = None) -> Engine:
    """The engine called `name`, with `threads` worker threads (default: one for each core).

    Raises:
        MissingPartError: its package is not installed.
    """
    if name not in ENGINES:
        raise MissingPartError(f"engine {name} is unknown; choose {' or '.join(ENGINES)}")
    package = {"onnxruntime": "device", "executorch": "export"}
    if importlib.util.find_spec(name) is None:
        raise MissingPartError(
            f"engine {name} is not installed; install it with "
            f"`pip install 'comigs[{package[name]}]'`"
        )
    count = threads or usable_cores()
    return OnnxRuntime(count) if name == "onnxruntime" else ExecuTorch(count)


def allocate(ports: Iterable[pb.Port], *, besides: Container[str] = ()) -> dict[str, Array]:
    """Port name -> zeroed array, for the ports not named in `besides`."""
    return {
        port.name: np.zeros(tuple(port.shape), np.dtype(port.dtype))
        for port in ports
        if port.name not in besides
    }


def allocate_outputs(entry: pb.Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays for a program's outputs; a cache that it updates in place is the one of `inputs`."""
    updated = {
        port.name: inputs[port.name.replace("updated.", "cache.", 1)]
        for port in entry.outputs
        if port.name.startswith("updated.")
    }
    return updated | allocate(entry.outputs, besides=updated)


def shortened(entry: pb.Program, length: int) -> pb.Program:
    """`entry` for arrays of so many tokens, if it takes any number."""
    short = pb.Program()
    short.CopyFrom(entry)
    for port in (*short.inputs, *short.outputs):
        if port.HasField("tokens_axis"):
            port.shape[port.tokens_axis] = length
    return short


def _check(ports: Mapping[str, pb.Port], arrays: Mapping[str, Array], what: str) -> None:
    for name, port in ports.items():
        array = arrays.get(name)
        if array is None:
            raise BundleError(f"{what} {name} is not bound")
        if not _fits(array.shape, port) or array.dtype != port.dtype:
            raise BundleError(
                f"{what} {name} is {array.dtype}{list(array.shape)}, the program wants "
                f"{port.dtype}{list(port.shape)}"
            )
        if not array.flags.c_contiguous:
            raise BundleError(f"{what} {name} is not contiguous")


def _fits(shape: tuple[int, ...], port: pb.Port) -> bool:
    if not port.HasField("tokens_axis"):
        return shape == tuple(port.shape)
    axis = port.tokens_axis
    least = (*port.shape[:axis], 1, *port.shape[axis + 1 :])
    return len(shape) == len(port.shape) and all(
        low <= size <= high for low, size, high in zip(least, shape, port.shape, strict=True)
    )


class OnnxRuntime:
    """ONNX Runtime on the CPU; arrays are passed by address."""

    name = "onnxruntime"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        # Programs that are one file share what is loaded of it, for as long as one of them is used.
        self._sessions: WeakValueDictionary[tuple[str, bool], Any] = WeakValueDictionary()

    def library(self) -> Any:
        import onnxruntime

        return onnxruntime

    def load(
        self, bundle: Bundle, program: str, *, packed: bool = True, unsigned: bool | None = None
    ) -> Program:
        onnxruntime = self.library()
        entry = bundle.program(program, self.name)
        file = entry.file
        if entry.unsigned_file and (cuts_sums(features()) if unsigned is None else unsigned):
            file = entry.unsigned_file
        key = (str(bundle.path / file), packed)
        loaded = self._sessions.get(key)
        if loaded is not None:
            return _OnnxProgram(entry, loaded)
        path = bundle.file(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # What is planned in advance is larger than what allocating as one goes needs, and no
        # faster; and planning takes time.
        options.enable_mem_pattern = False
        options.enable_mem_reuse = False
        # As written: the default leaves gradients, and what they are computed from, for the end.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        # Worker threads may wait actively between the operators of a run, but not between runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if denormals.CAN_BE_FLUSHED:
            options.add_session_config_entry("session.set_denormal_as_zero", "1")  # for its threads
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        # A process's first session switches this thread, too, and leaves it so.
        with bundle.checking(entry.data_files), denormals.flushed():
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        return_freed_memory()  # of what was made of weights on the way
        self._sessions[key] = session
        return _OnnxProgram(entry, session)


class _OnnxProgram:
    def __init__(self, entry: pb.Program, session: Any) -> None:
        self.session = session
        self.inputs = {port.name: port for port in entry.inputs}
        self.outputs = {port.name: port for port in entry.outputs}

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        _check(self.inputs, inputs, "input")
        _check(self.outputs, outputs, "output")
        binding = self.session.io_binding()
        for name in self.inputs:
            a = inputs[name]
            binding.bind_input(name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
        for name in self.outputs:
            a = outputs[name]
            binding.bind_output(name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
        switch = np.array(len(self.outputs) == len(self.session.get_outputs()))
        if EVERY_OUTPUT in [each.name for each in self.session.get_overridable_initializers()]:
            binding.bind_input(EVERY_OUTPUT, "cpu", 0, np.bool_, (), switch.ctypes.data)
        kept = (dict(inputs), dict(outputs), switch)  # the binding holds addresses, not references

        def call() -> None:
            assert kept
            with denormals.flushed():
                self.session.run_with_iobinding(binding)

        return call


class ExecuTorch:
    """ExecuTorch with XNNPACK. Its Python runtime brings torch along; the programs need none."""

    name = "executorch"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def library(self) -> Any:
        """What `executorch.runtime` wraps, which would import all that lowers programs, too."""
        import torch  # noqa: F401 - whose libraries it needs
        from executorch.extension.pybindings import _portable_lib

        return _portable_lib

    def load(
        self, bundle: Bundle, program: str, *, packed: bool = True, unsigned: bool | None = None
    ) -> Program:
        """XNNPACK makes its own copies of weights or not when a program is compiled, and is exact
        on any processor."""
        import torch

        runtime = self.library()
        # One pool for the whole process: it must not be replaced while a program runs.
        with _silent():  # how it looks for cores
            if runtime._threadpool_get_thread_count() != self.threads:
                runtime._unsafe_reset_threadpool(self.threads)
                torch.set_num_threads(self.threads)  # products outside XNNPACK use torch's threads
        entry = bundle.program(program, self.name)
        path = str(bundle.file(entry.file))
        loaded = runtime._load_program(path, program_verification=runtime.Verification.Minimal)
        return _ExecuTorchProgram(entry, loaded.load_method(entry.method))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Around what prints to standard error, below Python, what no user can act on."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


class _ExecuTorchProgram:
    def __init__(self, entry: pb.Program, method: Any) -> None:
        self.method = method
        self.inputs = {port.name: port for port in entry.inputs}
        self.outputs = {port.name: port for port in entry.outputs}

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        import torch

        _check(self.inputs, inputs, "input")
        _check(self.outputs, outputs, "output")
        arguments = [torch.from_numpy(inputs[name]) for name in self.inputs]
        results = [torch.from_numpy(outputs[name]) for name in self.outputs]

        def call() -> None:
            for into, value in zip(results, self.method(arguments), strict=True):
                into.copy_(value)

        return call
