import jax
import jax.numpy as jnp
import pytest

from llama_jax.plan.hlo import parse
from llama_jax.plan.hlo_cost import flops, kernel_flops, traffic
from tests.helpers import ROOT  # noqa: F401  (CPU devices)


def only(text, name="x"):
    """Returns the instruction `name` of a module of one computation, its scope and the module."""
    module = parse("ENTRY %main (a: f32[1]) -> f32[1] {\n" + text + "\n}\n")
    scope = module.computations["main"]
    return scope[name], scope, module


A = "%a = bf16[8,16]{1,0} parameter(0)\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "%b = bf16[16,4]{1,0} parameter(1)\n"
            "%x = bf16[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            2 * 8 * 4 * 16,
        ),
        (
            "%b = bf16[16,4]{1,0} parameter(1)\n"
            "%x = (bf16[8,4]{1,0}, s8[9]{0}) custom-call(%a, %b), "
            'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            2 * 8 * 4 * 16,
        ),
        # A batch dimension as a spatial one: window 1.
        (
            "%l = bf16[2,8,16]{2,1,0} parameter(1)\n%r = bf16[16,4,1]{1,0,2} parameter(2)\n"
            "%x = bf16[2,8,4]{2,1,0} convolution(%l, %r), window={size=1}, dim_labels=0bf_io0->0bf",
            2 * 2 * 8 * 4 * 16,
        ),
        # A contracted spatial dimension: the window covers all of it.
        (
            "%l = bf16[8,16,3]{2,1,0} parameter(1)\n%r = bf16[3,16,4]{2,1,0} parameter(2)\n"
            "%x = bf16[8,4,1]{1,0,2} convolution(%l, %r), window={size=3}, dim_labels=bf0_0io->bf0",
            2 * 8 * 4 * 16 * 3,
        ),
        # Padded on both sides: each output uses one element.
        (
            "%l = bf16[8,16,1]{2,1,0} parameter(1)\n%r = bf16[16,5,4]{2,1,0} parameter(2)\n"
            "%x = bf16[8,5,4]{1,0,2} convolution(%l, %r), "
            "window={size=5 pad=4_4 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            2 * 8 * 5 * 4 * 16,
        ),
        ("%x = bf16[8,16]{1,0} add(%a, %a)", 0),
    ],
)
def test_flops(text, expected):
    assert flops(*only(A + text)) == expected


def kernel(target, name, shape, operands=3):
    arrays = ", ".join([f"bf16{shape}{{3,2,1,0}}"] * operands)
    return only(
        f'%x = bf16[1]{{0}} custom-call(%a), custom_call_target="{target}", '
        f'operand_layout_constraints={{{arrays}}}, metadata={{op_name="f/{name}/call"}}'
    )[0]


# B N T T H: a multiplication and an addition each, half of it masked
SQUARE = 2 * 4 * 128 * 128 * 8


@pytest.mark.parametrize(
    ("target", "name", "products"),
    [
        ("tpu_custom_call", "splash_mha_fwd_residuals", 2),
        ("tpu_custom_call", "splash_mha_dkv_no_residuals", 4),
        ("tpu_custom_call", "splash_mha_dq_no_residuals", 3),
        ("__cudnn$fmhaSoftmax", "", 2),
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", "", 5),
        ("__gpu$xla.gpu.triton", "mha_forward", 2),
        ("__gpu$xla.gpu.triton", "mha_preprocess_backward", 0),
        ("__gpu$xla.gpu.triton", "mha_backward", 7),
        ("AllocateBuffer", "splash", 0),
    ],
)
def test_kernels(target, name, products):
    shape = "[2,4,128,8]" if "tpu" in target else "[2,128,4,8]"
    assert kernel_flops(kernel(target, name, shape)) == products * SQUARE


@pytest.mark.parametrize(("batch", "square"), [("2,", SQUARE), ("", SQUARE // 2)])
def test_the_kernels_of_one_sequence_and_of_several(batch, square):
    """XLA drops a dimension of 1; the fused kernel of splash also returns d_q, once per tile."""

    def flops_of(name, out="bf16[1]{0}"):
        one = kernel("tpu_custom_call", name, f"[{batch}4,128,8]")
        return kernel_flops(only(one.line.replace("bf16[1]{0}", out))[0])

    assert flops_of("splash_mha_fwd_residuals") == 2 * square
    whole = f"bf16[{batch}4,128,8]"
    assert flops_of("splash_mha_dkv_no_residuals", f"(f32[{batch}512,128], {whole})") == 4 * square
    fused = f"(bf16[{batch}8,4,128,8]{{3,2,1,0}}, {whole})"
    assert flops_of("splash_mha_dkv_no_residuals", fused) == 5 * square


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%x = bf16[8,16]{1,0} add(%a, %a)", 3 * 256),
        ("%x = bf16[16,8]{1,0} bitcast(%a)", 0),
        ("%x = bf16[1,16]{1,0} dynamic-slice(%a, %i)", 2 * 32),
        ("%u = bf16[1,16]{1,0} copy(%a)\n%x = bf16[8,16] dynamic-update-slice(%a, %u, %i)", 2 * 32),
        ("%x = (bf16[8,16], bf16[8,16]{1,0:S(1)}) copy-start(%a)", 256),
        ("%x = bf16[64,16]{1,0} all-gather(%a), dimensions={0}", 0),
        ("%x = ((bf16[8,16]), bf16[8,16]) call-start(%a), to_apply=%f", 0),
    ],
)
def test_traffic(text, expected):
    assert traffic(*only(A + text)) == expected


FUSED = """
%body (p0: f32[80,8], p1: s32[]) -> f32[80,8] {
  %p0 = f32[80,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %view = f32[80,8]{1,0} bitcast(%p0)
  %one = f32[1,8]{1,0} dynamic-slice(%view, %p1)
  %twice = f32[1,8]{1,0} add(%one, %one)
  ROOT %out = f32[80,8]{1,0} dynamic-update-slice(%p0, %twice, %p1)
}

ENTRY %main (a: f32[80,8]) -> f32[80,8] {
  %a = f32[80,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %x = f32[80,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%body
}
"""


def test_a_fusion_that_slices_reads_the_slice():
    module = parse(FUSED)
    scope = module.computations["main"]
    assert traffic(scope["x"], scope, module) == 32 + 4 + 32
    whole = FUSED.replace("dynamic-slice(%view, %p1)", "negate(%view)")
    module = parse(whole)
    scope = module.computations["main"]
    assert traffic(scope["x"], scope, module) == 80 * 32 + 4 + 32


def test_a_matrix_product_that_xla_compiled():
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    y = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    module = parse(jax.jit(lambda x, y: jnp.sin(x) @ y).lower(x, y).compile().as_text())
    found = sum(
        flops(one, scope, module)
        for name, scope in module.computations.items()
        for one in scope.values()
        if one.opcode == "dot"
    )
    assert found == 2 * 64 * 32 * 16
