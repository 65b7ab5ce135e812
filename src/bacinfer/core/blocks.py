"""Where residuals can be cached: the residual blocks of a transformer's layers, one adapter per layer class.

An adapter says how a layer's forward splits into residual blocks. A layer then computes, block by block,

    x = merge(layer, x, residual(layer, x, ...), ...)

and an engine may replace a residual by the one it stored. `register_layer` adds a layer class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from bacinfer.core.patching import replaced_methods


def add_residual(layer: nn.Module, x: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The plain residual connection, ``x + residual``."""
    return x + residual


@dataclass(frozen=True)
class ResidualBlock:
    """One residual branch of a layer class.

    Attributes:
        kind: Name in block keys: ``sa_block``, ``mha_block``, ``ff_block`` or your own. Bubbling union takes the
            blocks named ``ff_block`` for the feed-forward ones.
        module: Submodule whose output is the residual (``dropout1``).
        residual: ``residual(layer, x, *args, **kwargs) -> Tensor``, where x and the rest are what the layer's
            forward was called with (x as it stands before this block).
        merge: ``merge(layer, x, residual, *args, **kwargs) -> Tensor``; cheap, since it runs at every step.
        weights: Submodules that hold the block's parameters, to estimate its share of the computation.
    """

    kind: str
    module: str
    residual: Callable[..., Tensor]
    merge: Callable[..., Tensor] = add_residual
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerAdapter:
    """The residual blocks of a layer class, in the order of its forward.

    Attributes:
        layer_class: The class.
        forward: Its forward when it was registered, which is what the blocks are known to be parts of.
        blocks: The blocks.
    """

    layer_class: type[nn.Module]
    forward: Callable[..., Any]
    blocks: tuple[ResidualBlock, ...]

    @property
    def input_name(self) -> str:
        """Name of the forward's first argument, for layers that are called with keywords."""
        return list(inspect.signature(self.forward).parameters)[1]

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer's class computes what the blocks are parts of: an overridden forward need not."""
        return type(layer).forward is self.forward


@dataclass(frozen=True)
class Block:
    """A residual block of one layer of a model."""

    layer_name: str
    layer: nn.Module
    adapter: LayerAdapter
    spec: ResidualBlock

    @property
    def key(self) -> str:
        """As in schedules and assets: ``decoder.layers.0_sa_block``."""
        return f"{self.layer_name}_{self.spec.kind}"

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def num_weights(self) -> int:
        """How many weights the block multiplies each token with."""
        return sum(num_weights(self.layer.get_submodule(name)) for name in self.spec.weights)


def num_weights(module: nn.Module) -> int:
    """Entries of a module's weight matrices."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


_ADAPTER = "_bacinfer_adapter"
"""The attribute of a layer class that holds its adapter, so that it lives as long as the class."""

_registered: WeakSet[type[nn.Module]] = WeakSet()


def register_layer(layer: type[nn.Module] | nn.Module, blocks: Sequence[ResidualBlock]) -> None:
    """Makes the layers of a class cacheable.

    The class is matched exactly as far as its forward goes: a subclass that overrides `forward` needs a
    registration of its own. A registration lives as long as the class: one for each model is no leak where classes are
    made anew for each.

    Args:
        layer: The layer class, or one of its layers, where a model makes its classes itself:
            ``forward(self, x, ...)`` returns a tensor shaped like x [B, T, D].
        blocks: Its residual blocks, in the order in which forward applies them.

    Raises:
        TypeError: if `layer` is neither a module class nor a module.
        ValueError: if there are no blocks, two of one kind, or the class is registered with other blocks.
    """
    layer_class = _class_of(layer)
    kinds = [block.kind for block in blocks]
    if not blocks or len(set(kinds)) != len(kinds):
        raise ValueError(f"{layer_class.__name__} needs at least one block and a kind of its own for each, got {kinds}")
    adapter = LayerAdapter(layer_class, layer_class.forward, tuple(blocks))
    if vars(layer_class).get(_ADAPTER, adapter) != adapter:
        raise ValueError(f"{layer_class.__name__} is registered already; call unregister_layer first")
    setattr(layer_class, _ADAPTER, adapter)
    _registered.add(layer_class)


def unregister_layer(layer: type[nn.Module] | nn.Module) -> None:
    """Takes back `register_layer`; plans that are applied already keep working.

    Args:
        layer: The layer class, or one of its layers.

    Raises:
        TypeError: if `layer` is neither a module class nor a module.
        KeyError: if the class is not registered.
    """
    layer_class = _class_of(layer)
    _registered.remove(layer_class)
    delattr(layer_class, _ADAPTER)


def _class_of(layer: Any) -> type[nn.Module]:
    layer_class = layer if inspect.isclass(layer) else type(layer)
    if not issubclass(layer_class, nn.Module):
        raise TypeError(f"expected a torch.nn.Module class, or a layer of it, got {layer!r}")
    return layer_class


def find_blocks(model: nn.Module) -> list[Block]:
    """The residual blocks of a denoising model, in the order of `named_modules`, hence of the forward.

    A model with decoder layers uses `nn.TransformerEncoderLayer` to encode its condition, so the latter count as
    blocks only where no other registered layer is found (the encoder-only, BERT-like variant).

    Raises:
        ValueError: if no layer of a registered class is found; the message lists the layer classes that are
            there. Also if a layer lacks a submodule that its adapter names, if something else replaced its forward,
            or if the model was compiled by `torch.compile`.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "the model was compiled by torch.compile, and a cache cannot reach into its graphs; give the policy the "
            "module beneath (policy.model = policy.model._orig_mod), whose whole denoising loop the fused engines run"
        )
    layers = [(name, layer, _adapter(layer)) for name, layer in model.named_modules()]
    known = [(name, layer, adapter) for name, layer, adapter in layers if adapter is not None]
    if not known:
        raise ValueError(_no_layer_message(model))
    denoising = [entry for entry in known if entry[2].layer_class is not nn.TransformerEncoderLayer] or known
    blocks = [Block(name, layer, adapter, spec) for name, layer, adapter in denoising for spec in adapter.blocks]
    for block in blocks:
        missing = [n for n in (block.spec.module, *block.spec.weights) if not _has_submodule(block.layer, n)]
        if missing:
            raise ValueError(
                f"layer {block.layer_name!r} ({type(block.layer).__name__}) has no submodule {missing}, which its "
                f"registration as {block.adapter.layer_class.__name__} names; check register_layer"
            )
        if "forward" in replaced_methods(block.layer):
            raise ValueError(
                f"the forward of layer {block.layer_name!r} was replaced by something else, whose residual blocks are "
                f"not known; undo that first"
            )
    return blocks


def _adapter(layer: nn.Module) -> LayerAdapter | None:
    adapter = getattr(type(layer), _ADAPTER, None)
    return adapter if adapter is not None and adapter.fits(layer) else None


def _has_submodule(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def _no_layer_message(model: nn.Module) -> str:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    classes = {type(m) for m in model.modules() if m is not model and next(m.children(), None) is not None}
    names = sorted(c.__qualname__ for c in classes if not issubclass(c, containers))
    return (
        f"found no layer with known residual blocks in {type(model).__qualname__}. Its composite layers are "
        f"{names or 'none'}; known are {sorted(c.__qualname__ for c in _registered)} (subclasses must not override "
        f"forward). Tell how a layer class splits into residual blocks: "
        f"bacinfer.register_layer(LayerClass, [ResidualBlock('sa_block', module='dropout1', residual=...), ...])"
    )


# -- torch.nn's transformer layers, pre-norm (x + f(norm(x))) and post-norm (norm(x + f(x))) -------------------


def _branch_input(layer: nn.Module, x: Tensor, norm: str) -> Tensor:
    return getattr(layer, norm)(x) if layer.norm_first else x


def _merge(norm: str, layer: nn.Module, x: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + residual if layer.norm_first else getattr(layer, norm)(x + residual)


def _decoder_attention(
    kind: str,
    layer: Any,
    x: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Tensor:
    if kind == "sa_block":
        return layer._sa_block(_branch_input(layer, x, "norm1"), tgt_mask, tgt_key_padding_mask, tgt_is_causal)
    query = _branch_input(layer, x, "norm2")
    return layer._mha_block(query, memory, memory_mask, memory_key_padding_mask, memory_is_causal)


def _encoder_self_attention(
    layer: Any,
    x: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    return layer._sa_block(_branch_input(layer, x, "norm1"), src_mask, src_key_padding_mask, is_causal)


def _feed_forward(norm: str, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return layer._ff_block(_branch_input(layer, x, norm))


def _torch_block(kind: str, index: int, residual: Callable[..., Tensor], weights: tuple[str, ...]) -> ResidualBlock:
    """The index-th block of a torch.nn layer, whose norm and dropout carry that index."""
    return ResidualBlock(kind, f"dropout{index}", residual, partial(_merge, f"norm{index}"), weights)


register_layer(
    nn.TransformerDecoderLayer,
    [
        _torch_block("sa_block", 1, partial(_decoder_attention, "sa_block"), ("self_attn",)),
        _torch_block("mha_block", 2, partial(_decoder_attention, "mha_block"), ("multihead_attn",)),
        _torch_block("ff_block", 3, partial(_feed_forward, "norm3"), ("linear1", "linear2")),
    ],
)
register_layer(
    nn.TransformerEncoderLayer,
    [
        _torch_block("sa_block", 1, _encoder_self_attention, ("self_attn",)),
        _torch_block("ff_block", 2, partial(_feed_forward, "norm2"), ("linear1", "linear2")),
    ],
)
