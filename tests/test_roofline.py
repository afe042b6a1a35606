"""What kernels of a compiled program read, write and multiply, of texts as the compiler of GPUs writes them."""

import dataclasses

import pytest

from experiments import compiled, roofline, topology

LAYER = 64 * 32 * 2  # bytes of a layer's weights, bfloat16

TEXT = """HloModule jit_step, is_scheduled=true

%fused_dynamic_slice (param_0: bf16[7,64,32], param_1: s32[]) -> bf16[64,32] {
  %param_0 = bf16[7,64,32]{2,1,0} parameter(0)
  %convert = bf16[7,64,32]{2,1,0} negate(%param_0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %dynamic_slice = bf16[1,64,32]{2,1,0} dynamic-slice(%convert, %param_1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %bitcast.1 = bf16[64,32]{1,0} bitcast(%dynamic_slice)
}

%fused_dynamic_update_slice (param_2: bf16[7,16,32], param_3: bf16[16,32], param_4: s32[]) -> bf16[7,16,32] {
  %param_2 = bf16[7,16,32]{2,1,0} parameter(0)
  %param_3 = bf16[16,32]{1,0} parameter(1)
  %bitcast.2 = bf16[1,16,32]{2,1,0} bitcast(%param_3)
  %param_4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %dynamic_update_slice = bf16[7,16,32]{2,1,0} dynamic-update-slice(%param_2, %bitcast.2, %param_4, %zero.1, %zero.1)
}

%gemm_fusion_dot_computation (parameter_0: bf16[16,64], parameter_1: bf16[64,32]) -> bf16[16,32] {
  %parameter_0 = bf16[16,64]{1,0} parameter(0)
  %parameter_1 = bf16[64,32]{1,0} parameter(1)
  ROOT %dot = bf16[16,32]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%dynamic-slice-fusion (p0: bf16[7,64,32], p1: s32[], p2: f32[16,64]) -> (f32[16,32], s8[4194304]) {
  %p0 = bf16[7,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[16,64]{1,0} parameter(2)
  %zero.2 = s32[] constant(0)
  %dynamic_slice.1 = bf16[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %zero.2, %zero.2), dynamic_slice_sizes={1,64,32}
  %bitcast.3 = bf16[64,32]{1,0} bitcast(%dynamic_slice.1)
  ROOT %custom-call = (f32[16,32]{1,0}, s8[4194304]{0}) custom-call(%p2, %bitcast.3), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}

%fused_gate (param_5: bf16[16,64], param_6: f32[16,32]) -> (bf16[16,32], f32[16,32]) {
  %param_5 = bf16[16,64]{1,0} parameter(0)
  %param_6 = f32[16,32]{1,0} parameter(1)
  %slice.1 = bf16[16,32]{1,0} slice(%param_5), slice={[0:16], [0:32]}
  %slice.2 = bf16[16,32]{1,0} slice(%param_5), slice={[0:16], [32:64]}
  %multiply = bf16[16,32]{1,0} multiply(%slice.1, %slice.2), metadata={op_name="jit(step)/transpose(jvp())/mul"}
  %ones = f32[16,32]{1,0} broadcast(%one)
  %dynamic_update_slice.2 = f32[16,32]{1,0} dynamic-update-slice(%ones, %row, %zero.3, %zero.3)
  %one = f32[] constant(1)
  %row = f32[1,32]{1,0} constant({...})
  %zero.3 = s32[] constant(0)
  ROOT %tuple = (bf16[16,32]{1,0}, f32[16,32]{1,0}) tuple(%multiply, %dynamic_update_slice.2)
}

%body (loop: (s32[], bf16[7,64,32], bf16[7,16,32], bf16[16,64])) -> (s32[], bf16[7,64,32], bf16[7,16,32], bf16[16,64]) {
  %loop = (s32[], bf16[7,64,32]{2,1,0}, bf16[7,16,32]{2,1,0}, bf16[16,64]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%loop), index=0
  %weights = bf16[7,64,32]{2,1,0} get-tuple-element(%loop), index=1
  %stack = bf16[7,16,32]{2,1,0} get-tuple-element(%loop), index=2
  %x = bf16[16,64]{1,0} get-tuple-element(%loop), index=3
  %slice_fusion = bf16[64,32]{1,0} fusion(%weights, %turn), kind=kLoop, calls=%fused_dynamic_slice, metadata={op_name="jit(step)/jvp()/while/body/dynamic_slice"}
  %gemm_fusion = bf16[16,32]{1,0} fusion(%x, %slice_fusion), kind=kCustom, calls=%gemm_fusion_dot_computation, metadata={op_name="jit(step)/jvp()/while/body/dot_general"}
  %update_fusion = bf16[7,16,32]{2,1,0} fusion(%stack, %gemm_fusion, %turn), kind=kLoop, calls=%fused_dynamic_update_slice, metadata={op_name="jit(step)/transpose(jvp())/while/body/dynamic_update_slice"}
  ROOT %next = (s32[], bf16[7,64,32]{2,1,0}, bf16[7,16,32]{2,1,0}, bf16[16,64]{1,0}) tuple(%turn, %weights, %update_fusion, %x)
}

%condition (loop.1: (s32[], bf16[7,64,32], bf16[7,16,32], bf16[16,64])) -> pred[] {
  %loop.1 = (s32[], bf16[7,64,32]{2,1,0}, bf16[7,16,32]{2,1,0}, bf16[16,64]{1,0}) parameter(0)
  %turn.1 = s32[] get-tuple-element(%loop.1), index=0
  %turns = s32[] constant(7)
  ROOT %less = pred[] compare(%turn.1, %turns), direction=LT
}

ENTRY %main (start: (s32[], bf16[7,64,32], bf16[7,16,32], bf16[16,64]), y: f32[16,64], w: bf16[7,64,32], i: s32[]) -> f32[16,64] {
  %start = (s32[], bf16[7,64,32]{2,1,0}, bf16[7,16,32]{2,1,0}, bf16[16,64]{1,0}) parameter(0)
  %y = f32[16,64]{1,0} parameter(1)
  %w = bf16[7,64,32]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %while = (s32[], bf16[7,64,32]{2,1,0}, bf16[7,16,32]{2,1,0}, bf16[16,64]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %all-reduce-start = f32[16,64]{1,0} all-reduce-start(%y), to_apply=%sum
  %all-reduce-done = f32[16,64]{1,0} all-reduce-done(%all-reduce-start)
  %dynamic_slice_fusion = (f32[16,32]{1,0}, s8[4194304]{0}) fusion(%w, %i, %y), kind=kCustom, calls=%dynamic-slice-fusion
  %gate_fusion = (bf16[16,32]{1,0}, f32[16,32]{1,0}) fusion(%x.1, %z), kind=kLoop, calls=%fused_gate
  %x.1 = bf16[16,64]{1,0} get-tuple-element(%while), index=3
  %z = f32[16,32]{1,0} get-tuple-element(%dynamic_slice_fusion), index=0
  %product = (f32[16,32]{1,0}, s8[4194304]{0}) custom-call(%x.1, %halves), custom_call_target="__cublas$gemm", backend_config={"lhs_contracting_dimensions":["1"]}
  %halves = bf16[64,32]{1,0} slice(%w), slice={[0:1], [0:64], [0:32]}
  ROOT %copy = f32[16,64]{1,0} copy(%all-reduce-done)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""

KERNELS = {  # bytes and floating-point operations of each
    ("body", "slice_fusion"): (2 * LAYER + 4, 0),  # of seven layers one is read, through what is done to each number
    ("body", "gemm_fusion"): ((16 * 64 + 64 * 32 + 16 * 32) * 2, 2 * 16 * 64 * 32),
    ("body", "update_fusion"): (2 * 16 * 32 * 2 + 4, 0),  # written where it is
    ("ENTRY", "dynamic_slice_fusion"): (LAYER + 4 + 16 * 64 * 4 + 16 * 32 * 4, 2 * 2 * 16 * 64 * 32),  # without the workspace; float32 counts twice
    ("ENTRY", "gate_fusion"): ((16 * 64 + 16 * 32) * 2 + 16 * 32 * 4, 0),  # both halves; what is changed is new, and written whole
    ("ENTRY", "product"): ((16 * 64 + 64 * 32) * 2 + 16 * 32 * 4, 2 * 16 * 64 * 32), ("ENTRY", "halves"): (2 * LAYER, 0),
    ("ENTRY", "copy"): (2 * 16 * 64 * 4, 0), ("ENTRY", "while"): (0, 0), ("ENTRY", "all-reduce-start"): (0, 0), ("ENTRY", "all-reduce-done"): (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS, ids="/".join)
def test_a_kernel_takes_what_it_touches(kernel):
    assert roofline.Program(TEXT).kernel(*kernel) == KERNELS[kernel]


def test_work_is_counted_by_part_and_by_turn():
    """Of a GPU whose memory or whose products take no time, what is left is the other, and the start of each kernel."""
    bytes_of = lambda *names: sum(size for (_, name), (size, _) in KERNELS.items() if name in names)
    h100, lines = topology.GPUS["h100"], compiled.run_lines(TEXT, None)
    found = roofline.seconds(TEXT, lines, dataclasses.replace(h100, tflops=1e30))
    rate, start = roofline.REACHED_BANDWIDTH * h100.bandwidth * 1e12, roofline.START_S
    assert found["sampling"] == 0
    assert found["forward"] == pytest.approx(7 * (2 * start + bytes_of("slice_fusion", "gemm_fusion") / rate))
    # Where a kernel does not say what it belongs to, what is fused in it does.
    assert found["backward"] == pytest.approx(7 * (start + bytes_of("update_fusion") / rate) + start + bytes_of("gate_fusion") / rate)
    assert found["update and the rest"] == pytest.approx(4 * start + bytes_of("dynamic_slice_fusion", "copy", "product", "halves") / rate)
    found = roofline.seconds(TEXT, lines, dataclasses.replace(h100, bandwidth=1e30))
    products = 2 * 16 * 64 * 32 / (roofline.REACHED_FLOPS * h100.tflops * 1e12)
    assert found["forward"] == pytest.approx(7 * (2 * start + products)) and found["update and the rest"] == pytest.approx(4 * start + 3 * products)
