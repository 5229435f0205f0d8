"""A torch module becomes ONNX by ``torch.onnx.export``, on the machine of the model's author.

The only place that knows torch. It is imported when a module is given, and never otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from meshinfer.errors import ConfigurationError, InvalidInput, MeshInferError
from meshinfer.importers.torch_faults import EXPORTERS, advice, is_users, where, words

_FLAT_WEIGHTS = "_flat_weights"

Axes = Mapping[str, Sequence[int | str | None]]
"""Input name -> sizes: a number is fixed, a name or None may vary."""


def is_torch_module(model: object) -> bool:
    """Whether it is a ``torch.nn.Module``. Imports nothing: who has a module has imported torch."""
    module = getattr(sys.modules.get("torch.nn"), "Module", None)
    return module is not None and isinstance(model, module)


def from_torch(module: Any, example: object, *, shapes: Axes | None = None) -> onnx.ModelProto:
    """Export a ``torch.nn.Module``, in eval mode, to an ONNX model with its weights inside.

    ``example``: what ``forward`` takes. A tuple holds its positional arguments, a dict its keyword
    arguments, anything else is its only argument. Tensors, numpy arrays and numpy scalars in it,
    also inside lists and dicts, become inputs, named as the parameters (``images.0`` for what is
    inside); Python numbers, strings, booleans and None are options, fixed in the model.
    ``shapes``: input name -> sizes; an axis that is None or a name may vary, all others are as in
    the example.

    Outputs are named by their keys (dicts) or fields (dataclasses, named tuples); ``output_0``, ...
    in a tuple; ``aux.low`` or ``aux.0`` for what is inside; ``output`` when it is the only one.
    A model above 2 GB cannot be serialised; save it with ``onnx.save_model`` and external data.

    Warnings of torch are passed on, but for those about deprecated parts of the exporter itself.
    Raises ``InvalidInput``, with the line of the model that cannot be exported;
    ``ConfigurationError`` where torch or onnxscript is missing.
    """
    proto: onnx.ModelProto = ir.to_proto(_exported(module, example, shapes)[0])
    return proto


def of_example(
    module: Any, example: object, shapes: Axes | None
) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """As ``from_torch``, with the shapes of the example."""
    model, call = _exported(module, example, shapes)
    return ir.to_proto(model), {name: tuple(t.shape) for name, t in call.tensors.items()}


def _exported(module: Any, example: object, shapes: Axes | None) -> tuple[ir.Model, _Call]:
    """The model, its weights still those of the module: not copied."""
    if not is_torch_module(module):
        raise InvalidInput(
            f"{type(module).__name__} is no torch module", hint="give a torch.nn.Module"
        )
    torch = _torch()
    if example is None:
        raise InvalidInput(
            f"{type(module).__name__} is a torch module, and without an example of its input",
            hint="give one, it is run once: example=torch.zeros(1, 3, 224, 224), or a tuple or "
            "dict of what forward takes",
        )
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if isinstance(module, torch.jit.ScriptModule):
        raise InvalidInput(
            f"{getattr(module, 'original_name', 'the module')} is TorchScript, which torch.export "
            "cannot follow",
            hint="give the module that was scripted or traced",
        )
    call = _Call(torch, module, example)
    adapter = _adapter(torch, module, call)
    axes = _dynamic(torch, call, shapes)
    training = [(each, each.training) for each in adapter.modules()]
    adapter.eval()
    try:
        with torch.no_grad(), _passed_on():
            _run(adapter, call)
            program = _export(torch, adapter, call, axes)
    finally:
        for each, was in training:
            each.training = was
    _rename(program.model, call)
    return program.model, call


def _torch() -> Any:
    try:
        import onnxscript  # noqa: F401  torch's exporter is made of it
        import torch
        import torch.onnx
    except ImportError as error:
        raise ConfigurationError(
            f"torch modules need {error.name}, which is not installed",
            hint='pip install "meshinfer[torch]"',
        ) from error
    return torch


class _Call:
    """The example, taken apart: ``tensors`` by name, and how ``forward`` is called with others.

    ``outputs``: the names of what it returned the last time that Python ran it.
    """

    def __init__(self, torch: Any, module: Any, example: object) -> None:
        self._torch = torch
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.tensors: dict[str, Any] = {}
        self.outputs: list[str] = []
        self.args: tuple[object, ...] = ()
        self.kwargs: dict[str, object] = {}
        if isinstance(example, Mapping):
            self.kwargs = {str(k): self._take(str(k), v) for k, v in example.items()}
        else:
            given = example if type(example) is tuple else (example,)
            names = _parameters(module)
            self.args = tuple(
                self._take(name, each)
                for name, each in zip(_spread(names, len(given)), given, strict=True)
            )
        if not self.tensors:
            raise InvalidInput(
                f"the example of {type(module).__name__} holds no tensor",
                hint=f"forward takes {[n for n, _ in _parameters(module)]}; give tensors or arrays",
            )

    def _take(self, name: str, value: object) -> object:
        """The value with each tensor replaced by its place in ``tensors``."""
        if isinstance(value, np.ndarray | np.generic):
            value = self._torch.tensor(np.asarray(value))
        if isinstance(value, self._torch.Tensor):
            self.tensors[name] = value.detach().to(self._device)
            return _Slot(len(self.tensors) - 1)
        return _rebuilt(value, lambda key, each: self._take(f"{name}.{key}", each))

    def filled(self, tensors: Sequence[object]) -> tuple[Any, Any]:
        """Arguments and keyword arguments with these tensors."""

        def fill(key: object, value: object) -> Any:
            return tensors[value.index] if isinstance(value, _Slot) else _rebuilt(value, fill)

        return (
            tuple([fill(i, each) for i, each in enumerate(self.args)]),
            {name: fill(name, each) for name, each in self.kwargs.items()},
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    index: int


def _rebuilt(value: Any, change: Callable[[object, object], object]) -> Any:
    """A list, tuple or dict with each element changed; anything else as it is."""
    if isinstance(value, dict):
        return {key: change(key, each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields: Any = value
        return fields._make([change(key, getattr(value, key)) for key in fields._fields])
    if isinstance(value, list | tuple):
        return type(value)([change(i, each) for i, each in enumerate(value)])
    return value


def _parameters(module: Any) -> list[tuple[str, bool]]:
    """The parameters of ``forward``, and whether it takes any number of arguments."""
    try:
        found = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [(p.name, p.kind is p.VAR_POSITIONAL) for p in found if p.kind is not p.VAR_KEYWORD]


def _spread(names: Sequence[tuple[str, bool]], count: int) -> Iterator[str]:
    """A name for each positional argument."""
    several = ""
    for i in range(count):
        if not several and i < len(names):
            name, is_several = names[i]
            if not is_several:
                yield name
                continue
            several, first = name, i
        elif not several:
            several, first = "input", i
        yield f"{several}.{i - first}"


def _adapter(torch: Any, module: Any, call: _Call) -> Any:
    """The module as one from tensors to tensors, whatever it takes and returns."""

    class Adapter(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            args, kwargs = call.filled(tensors)
            found = list(_leaves(self.module(*args, **kwargs), ""))
            if not torch.compiler.is_dynamo_compiling():
                call.outputs[:] = [name or "output" for name, _ in found]
            tensor = torch.Tensor
            return tuple([v if isinstance(v, tensor) else torch.tensor(v) for _, v in found])

    return Adapter()


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The tensors and numbers of what a module returns, with their names; None is left out."""
    inside = f"{name}." if name else ""
    if value is None:
        return
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, f"{inside}{key}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{inside}{field.name}")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            yield from _leaves(getattr(value, key), f"{inside}{key}")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _leaves(each, f"{inside or 'output_'}{i}")
    elif isinstance(value, bool | int | float) or hasattr(value, "is_floating_point"):
        yield name, value
    else:
        raise InvalidInput(
            f"the module returns {type(value).__name__}{f' as {name!r}' if name else ''}",
            hint="return tensors, in tuples, lists, dicts, named tuples or dataclasses",
        )


def _dynamic(torch: Any, call: _Call, shapes: Axes | None) -> Any:
    """torch's ``dynamic_shapes`` of the adapter; None when all are fixed."""
    unknown = sorted(set(shapes or ()) - set(call.tensors))
    if unknown:
        raise InvalidInput(
            f"the module has no input {unknown[0]!r}", hint=f"its inputs are {list(call.tensors)}"
        )
    free: list[dict[int, Any] | None] = []
    for name, tensor in call.tensors.items():
        sizes = (shapes or {}).get(name)
        if sizes is None:
            free.append(None)
            continue
        given = list(tensor.shape)
        fits = len(sizes) == len(given) and all(
            s is None or isinstance(s, str) or int(s) == g
            for s, g in zip(sizes, given, strict=True)
        )
        if not fits:
            raise InvalidInput(
                f"shapes say {list(sizes)} of {name!r}, the example has {given}",
                hint="give None, or a name, for each size that may vary, and the example's else",
            )
        varies = [i for i, s in enumerate(sizes) if s is None or isinstance(s, str)]
        free.append(dict.fromkeys(varies, torch.export.Dim.DYNAMIC))
    return {"tensors": tuple(free)} if any(free) else None


def _run(adapter: Any, call: _Call) -> None:
    """Once as it is: what fails here is no matter of exporting. It names the outputs, too."""
    name = type(adapter.module).__name__
    before = [(buffer, buffer.clone()) for buffer in adapter.buffers()]
    try:
        adapter(*(tensor.clone() for tensor in call.tensors.values()))
    except MeshInferError:
        raise
    except Exception as error:
        given = {n: list(t.shape) for n, t in call.tensors.items()}
        raise InvalidInput(
            f"{name} fails on the example: {words(error)}{where(error)}",
            hint=f"the example gives {given}; forward takes "
            f"{[n for n, _ in _parameters(adapter.module)]}",
        ) from error
    finally:
        for buffer, was in before:  # one that counts its calls
            buffer.copy_(was)
    if not call.outputs:
        raise InvalidInput(f"{name} returns nothing", hint="return a tensor, or several")


def _export(torch: Any, adapter: Any, call: _Call, axes: Any) -> Any:
    name = type(adapter.module).__name__
    try:
        with _quiet():
            return torch.onnx.export(
                adapter,
                tuple(call.tensors.values()),
                dynamo=True,
                verbose=False,
                dynamic_shapes=axes,
            )
    except MeshInferError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"{name} cannot be exported: {words(error)}{where(error)}",
            hint=advice(error),
        ) from error


@contextlib.contextmanager
def _passed_on() -> Iterator[None]:
    """Warnings, each once though the model runs twice, and without those of the exporter.

    Its own are raised in its files, or Python's: deprecations, for its developers to see, and that
    torch's recurrent layers assign their weights anew.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    own = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    seen = set()
    for each in said:
        what = (str(each.message), each.category, each.filename, each.lineno)
        noise = issubclass(each.category, own) or _FLAT_WEIGHTS in what[0]
        if what in seen or (noise and not is_users(each.filename)):
            continue
        seen.add(what)
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress, no graphs and no stack traces on the terminal; what matters is raised."""
    loggers = [logging.getLogger(name) for name in EXPORTERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _rename(model: ir.Model, call: _Call) -> None:
    """Give inputs and outputs their names; whatever else has one of them gets another."""
    graph = model.graph
    wanted = [*call.tensors]
    assert len(graph.inputs) == len(wanted), "an input was lost in the export"
    taken = set(wanted)
    for name in call.outputs[: len(graph.outputs)]:
        while name in taken:  # an output of the name of an input
            name += "_out"
        taken.add(name)
        wanted.append(name)
    ends = [*graph.inputs, *graph.outputs]
    others = [v for v in _values(graph) if v.name in taken and not any(v is e for e in ends)]
    for i, value in enumerate((*others, *ends)):
        value.name = f"{value.name}~{i}"
    for value, name in zip(ends, wanted, strict=True):
        value.name = name


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [v for node in graph.all_nodes() for v in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *made]
