"""Let another layer stand in a weight's product, and undo it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from poise.errors import ConfigError
from poise.walk.product import Product
from poise.walk.weight import Weight


def replace(weight: Weight, layer: nn.Module) -> Callable[[], None]:
    """Route a weight's product through `layer(x)`, a fused expert's too, and return what undoes it.

    The layer is called where the model multiplied by W: it gets x (..., in) and returns (..., out), with
    the bias where the layer that it replaces added one. `weight.layer` is what it replaces, and usually
    calls.
    To be seen by the walk it has `held_weights(path)`; for an adapter, that of what it wraps:

        def held_weights(self, path):
            yield from poise.walk.held(self.base, path)

    Undone, the model holds the same objects as before: the same layer, the same 3-D parameter.

    Raises
    ------
    ConfigError
        Where the weight takes part in its module's own arithmetic, or the model itself is the layer.
    """
    before = weight.layer
    if not hasattr(layer, "held_weights"):
        raise ConfigError(f"{type(layer).__name__} cannot take the place of {weight.name}: it has no "
                          f"held_weights(path), so the weight would be lost to the walk")
    for slot in weight.slots:
        slot.put(layer)
    # models look at a linear's weight and bias, torch's fused paths take them; in its __dict__, since they
    # are no parameters of this layer
    for name, stand_in in (("weight", Product(layer)), ("bias", getattr(before, "bias", None))):
        if not hasattr(layer, name):
            layer.__dict__[name] = stand_in

    def undo() -> None:
        if any(slot.get() is not layer for slot in weight.slots):
            raise ConfigError(f"{weight.name}: another layer has been put over this one: undo that first")
        for slot in weight.slots:
            slot.put(before)

    return undo
