from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from bacinfer import ResidualBlock, register_layer, unregister_layer
from bacinfer.core.blocks import find_blocks
from bacinfer.core.bubbling import split_block_key
from helpers import WIDTH, TinyPolicy, decoder_model, encoder_model


def test_blocks_of_a_decoder_are_named_as_in_the_reference() -> None:
    blocks = find_blocks(decoder_model(2))
    assert [b.key for b in blocks] == [
        f"decoder.layers.{i}_{kind}" for i in range(2) for kind in ("sa_block", "mha_block", "ff_block")
    ]
    assert [split_block_key(b.key)[0] for b in blocks] == [0, 0, 0, 1, 1, 1]


def test_blocks_of_an_encoder_only_model() -> None:
    blocks = find_blocks(encoder_model(2))
    assert [(b.kind, b.key) for b in blocks] == [
        ("sa_block", "encoder.layers.0_sa_block"),
        ("ff_block", "encoder.layers.0_ff_block"),
        ("sa_block", "encoder.layers.1_sa_block"),
        ("ff_block", "encoder.layers.1_ff_block"),
    ]


def test_weights_of_blocks() -> None:
    sa, mha, ff = find_blocks(decoder_model(1))
    assert sa.num_weights == mha.num_weights == 4 * WIDTH**2
    assert ff.num_weights == 8 * WIDTH**2


def test_encoder_of_the_condition_is_left_alone() -> None:
    model = decoder_model(1)
    model.encoder = encoder_model(2).encoder
    assert {b.layer_name for b in find_blocks(model)} == {"decoder.layers.0"}


@pytest.mark.parametrize("make", [decoder_model, encoder_model])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_is_the_sum_of_its_blocks(make, norm_first: bool) -> None:  # type: ignore[no-untyped-def]
    policy = TinyPolicy(make(1, norm_first))
    (block, *_) = blocks = find_blocks(policy.model)
    x, memory = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    args = (memory,) if make is decoder_model else ()
    y = x
    for b in blocks:
        y = b.spec.merge(b.layer, y, b.spec.residual(b.layer, y, *args), *args)
    assert torch.equal(y, block.layer(x, *args))


def test_model_without_known_layers_is_an_error_that_lists_what_it_has() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3), nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match=r"MultiheadAttention.*TransformerDecoderLayer.*register_layer"):
        find_blocks(model)


class Overridden(nn.TransformerDecoderLayer):
    def forward(self, tgt, memory, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        return 2 * super().forward(tgt, memory, *args, **kwargs)


class Subclass(nn.TransformerDecoderLayer):
    pass


def test_subclass_counts_unless_it_overrides_forward() -> None:
    assert len(find_blocks(nn.ModuleList([Subclass(8, 2)]))) == 3
    with pytest.raises(ValueError, match="Overridden"):
        find_blocks(nn.ModuleList([Overridden(8, 2)]))


class Other(nn.Module):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return x


BLOCK = ResidualBlock("ff_block", "mlp", residual=lambda layer, x: x)


def test_registration_is_checked() -> None:
    for wrong in (int, 3, Other.forward):
        with pytest.raises(TypeError, match="Module class, or a layer of it"):
            register_layer(wrong, [BLOCK])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one block"):
        register_layer(Other, [])
    with pytest.raises(ValueError, match="a kind of its own"):
        register_layer(Other, [BLOCK, BLOCK])
    with pytest.raises(ValueError, match="registered already"):
        register_layer(nn.TransformerDecoderLayer, [BLOCK])
    with pytest.raises(KeyError):
        unregister_layer(Other)


def test_layer_that_lacks_a_named_submodule_is_an_error() -> None:
    register_layer(Other, [BLOCK])
    try:
        with pytest.raises(ValueError, match=r"no submodule \['mlp'\]"):
            find_blocks(nn.ModuleList([Other()]))
    finally:
        unregister_layer(Other)


def gated_layer() -> nn.Module:
    """A layer of a class that is made anew each time, as models of remote code make theirs."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(4, 4)

        def forward(self, x):  # type: ignore[no-untyped-def]
            assert super() is not None  # keeps the class in the forward's closure
            return x + self.mlp(x)

    return Layer()


def test_a_layer_stands_for_its_class_and_for_no_other_of_that_name() -> None:
    layer = gated_layer()
    register_layer(layer, [BLOCK])
    register_layer(type(layer)(), [BLOCK])  # the same again, as in a loop over a model's layers
    assert [block.key for block in find_blocks(nn.ModuleList([layer, type(layer)()]))] == ["0_ff_block", "1_ff_block"]
    with pytest.raises(ValueError, match="no layer with known residual blocks"):
        find_blocks(nn.ModuleList([gated_layer()]))
    with pytest.raises(ValueError, match="registered already"):
        register_layer(layer, [ResidualBlock("ff_block", "mlp", residual=lambda layer, x: layer.mlp(x))])
    unregister_layer(layer)
    with pytest.raises(ValueError, match="no layer with known residual blocks"):
        find_blocks(nn.ModuleList([layer]))


def test_registrations_of_classes_that_are_gone_are_gone() -> None:
    layer = gated_layer()
    register_layer(layer, [ResidualBlock("ff_block", "mlp", residual=type(layer).forward)])
    gone = weakref.ref(type(layer))
    del layer
    gc.collect()
    assert gone() is None
