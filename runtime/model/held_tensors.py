"""A block's tensors as calibration holds them, out of which the builders of served models make it, and looks inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.quantized_activation import Hidden
from octavo.quant.formats.transforms import NO_TRANSFORMS, Transforms
from octavo.quant.input_rounding import Round
from octavo.quant.linear import Linear
from octavo.quant.qparams import Weight
from octavo.runtime.model.sources import CheckpointSource, LoadError, check_shape


class HeldTensors:
    """A Source over tensors in memory, by their names in the checkpoint.

    beside: where what isn't held is found; None: nowhere
    """

    def __init__(
        self, prefix: str, transforms: Transforms = NO_TRANSFORMS, beside: CheckpointSource | None = None
    ) -> None:
        self.prefix = prefix
        self.transforms = transforms
        self.tensors: Mapping[str, Tensor] = {}
        self._beside = beside

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the source have these tensors while the context lasts; afterwards nothing holds them."""
        self.tensors = tensors
        try:
            yield
        finally:
            self.tensors = {}

    def has(self, module: str) -> bool:
        held = any(name.rpartition(".")[0] == module for name in self.tensors)
        return held or (self._beside is not None and self._beside.has(module))

    def require(self, modules: Iterable[str]) -> None:
        """Raise LoadError for a module of which there is no tensor."""
        for module in modules:
            if not self.has(module):
                raise LoadError(f"the checkpoint has no weights for {module}")

    def linear(self, module: str, out_features: int, in_features: int) -> Weight:
        return self.tensor(f"{module}.weight", (out_features, in_features))

    def leave(self, module: str, out_features: int, in_features: int) -> None:
        """Never asked for: calibration has one rank, which has every layer."""

    def is_quantized(self, module: str) -> bool:  # noqa: ARG002
        return False

    def bias(self, module: str, out_features: int, *, expected: bool) -> Tensor | None:
        name = f"{module}.bias"
        return self.tensor(name, (out_features,)) if expected or name in self.tensors else None

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors.get(name)
        if tensor is None and self._beside is not None:
            return self._beside.tensor(name, shape)
        if tensor is None:
            raise LoadError(f"the checkpoint has no tensor {name}")
        check_shape(name, tensor.shape, shape)
        return tensor


class Through(Linear):
    """A linear layer whose input goes through a function first."""

    def __init__(self, inner: Linear, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inner.scheme, inner.parts, inner.bias, inner.out_dtype)
        self._inner = inner
        self._before = before

    def forward(self, x: Hidden, step: StepInputs | None) -> Tensor:
        return self._inner.forward(self._passed(x), step)

    def partial(self, x: Hidden, step: StepInputs | None) -> Tensor:
        return self._inner.partial(self._passed(x), step)

    def _passed(self, x: Hidden) -> Tensor:
        assert isinstance(x, Tensor)  # calibration's layers are dense: none reads codes
        return self._before(x)


def rounding_by(rounds: Mapping[str, Round]) -> Callable[[str, Linear], Linear]:
    """What rounds the inputs of some of a layer's linear layers, by their names in it; for `map_linears`."""

    def change(name: str, linear: Linear) -> Linear:
        rounded = rounds.get(name)
        return linear if rounded is None else Through(linear, lambda x: rounded(x).to(x.dtype))

    return change


def showing(linear: Linear, record: Callable[[Tensor], None]) -> Linear:
    """The linear layer, which shows its input each time."""

    def show(x: Tensor) -> Tensor:
        record(x)
        return x

    return Through(linear, show)
