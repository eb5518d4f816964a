"""The machine that runs PTX: it finds what kernels do wrong, and computes what instructions say."""

import re

import ml_dtypes
import numpy as np
import pytest
from ptx_machine import build

HEADER = ".version 9.0\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 shared[];\n"
# Every kernel has t = %r0, the address of its word in `in` (%rd0), in `out` (%rd1), and in shared memory (%r1).
ENTRY = """
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u64 kernel_param_1
)
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .f32 	%f<9>;
	.reg .b32 	%r<40>;
	.reg .b64 	%rd<9>;

	mov.u32 	%r0, %tid.x;
	ld.param.u64 	%rd0, [kernel_param_0];
	ld.param.u64 	%rd1, [kernel_param_1];
	mul.wide.u32 	%rd2, %r0, 4;
	add.s64 	%rd0, %rd0, %rd2;
	add.s64 	%rd1, %rd1, %rd2;
	mov.u32 	%r1, shared;
	shl.b32 	%r2, %r0, 2;
	add.s32 	%r1, %r1, %r2;
"""
# Writes its own word to shared memory, takes its neighbour's.
NEIGHBOURS = """ld.global.u32 %r3, [%rd0];
	st.shared.u32 [%r1], %r3;
	BARRIER
	xor.b32 %r4, %r1, 4;
	ld.shared.u32 %r5, [%r4];
	st.global.u32 [%rd1], %r5;
	ret;"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return build(tmp_path_factory.mktemp("machine"))


def run(machine, body, data, *, order="forwards", threads=32, shared=4096, out=None):
    """What went wrong, and the words that the kernel wrote: uint32 like `out`, by default one a thread."""
    machine.load(HEADER + ENTRY + "\n\t" + body + "\n}\n\n")
    machine.order(order)
    data = np.ascontiguousarray(data)
    data.setflags(write=False)
    out = np.zeros(threads, np.uint32) if out is None else out
    return machine.launch("kernel", 1, threads, shared, data, out), out


WORDS = np.arange(64, dtype=np.uint32) * 3
FAULTY = {
    "reads beyond": (
        "ld.global.u32 %r3, [%rd0+132];",
        "reads beyond all buffers.*argument 0, which has 256 bytes: 256",
    ),
    "writes beyond": ("st.global.u32 [%rd1+4], %r0;", "writes beyond all buffers"),
    "misaligned": ("ld.global.v2.u32 {%r3, %r4}, [%rd0];", "misaligned access to global memory, 8 bytes"),
    "writes to an input": ("st.global.u32 [%rd0], %r0;", "writes to argument 0, which is an input"),
    "reads what nobody wrote": ("ld.shared.u32 %r3, [%r1];", "reads shared memory that nobody wrote"),
    "reads a result": ("ld.global.u32 %r3, [%rd1];", "reads of argument 1 what nobody wrote"),
    "beyond shared memory": ("st.shared.u32 [%r1+4092], %r0;", "beyond shared memory"),
    "misaligned shared": ("st.shared.v4.u32 [%r1], {%r0, %r0, %r0, %r0};", "misaligned access to shared memory"),
    "two write": ("ld.param.u64 %rd3, [kernel_param_1]; st.global.u32 [%rd3], %r0;", "where another thread wrote"),
    "two write shared": ("mov.u32 %r4, shared; st.shared.u32 [%r4], %r0;", "wrote, and no barrier stands between"),
    "no barrier": (NEIGHBOURS.replace("BARRIER", ""), "no barrier stands between|nobody wrote"),
    "one barrier for two rounds": (
        NEIGHBOURS.replace("BARRIER", "bar.sync 0;").replace("ret;", "add.s32 %r5, %r5, 1; st.shared.u32 [%r1], %r5;"),
        "shared memory that .* no barrier stands between",
    ),
    "some never come": (
        "setp.lt.u32 %p1, %r0, 9; @%p1 bra $L; bar.sync 0; $L: bar.warp.sync -1;",
        "wait for each other",
    ),
    "shuffle with one that ended": (
        "setp.lt.u32 %p1, %r0, 9; @%p1 ret; shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;",
        "waits for lane 0, which has ended",
    ),
    "copy not waited for": (
        "shl.b32 %r3, %r0, 4; mov.u32 %r4, shared; add.s32 %r3, %r3, %r4; ld.param.u64 %rd3, [kernel_param_0];"
        "cp.async.ca.shared.global [%r3], [%rd3], 16; cp.async.commit_group; ld.shared.u32 %r5, [%r3];",
        "a copy under way writes",
    ),
    "copy never waited for": (
        "ld.param.u64 %rd3, [kernel_param_0]; cp.async.ca.shared.global [%r1], [%rd3], 4;",
        "ends with asynchronous copies under way",
    ),
    "divides by zero": ("div.u32 %r3, %r0, 0;", "divides by zero"),
}


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
@pytest.mark.parametrize("name", FAULTY)
def test_faults_are_found_in_any_order(machine, name, order):
    body, message = FAULTY[name]
    if name != "some never come":
        body += " ret;"
    data = np.zeros(65, np.uint32)[1:] if name == "misaligned" else WORDS  # its first word, too, is at 128 bytes
    found, _ = run(machine, body, data, order=order)
    assert re.search(message, found), found


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
@pytest.mark.parametrize("threads, barrier", [(64, "bar.sync 0;"), (32, "bar.warp.sync -1;")])
def test_with_a_barrier_neighbours_see_each_other(machine, order, threads, barrier):
    found, out = run(machine, NEIGHBOURS.replace("BARRIER", barrier), WORDS, order=order, threads=threads)
    assert not found
    np.testing.assert_array_equal(out, WORDS[np.arange(threads) ^ 1])


def test_what_is_not_known_is_refused_by_name(machine):
    for statement in (
        "sin.approx.f32 %f1, %f2",
        "wgmma.fence.sync.aligned",
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %f1, %f2",
        "bar.sync 1, 64",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1,%r2},{%r1,%r2,%r3,%r4},{%r1,%r2},{%r1,%r2}",
    ):
        with pytest.raises(NotImplementedError, match=statement.split(".")[0]):
            run(machine, statement + "; ret;", WORDS)


def signed(x, bits=32):
    return x - (x >> (bits - 1) << bits)


# %r3 is the word, %r4 its neighbour; the result in %r5. Each beside what Python makes of a and b.
ARITHMETIC = {
    "add.s32 %r5, %r3, %r4;": lambda a, b: a + b,
    "mul.lo.s32 %r5, %r3, %r4;": lambda a, b: a * b,
    "mul.hi.u32 %r5, %r3, %r4;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r5, %r3, %r4;": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.wide.s32 %rd4, %r3, %r4, 5; shr.u64 %rd4, %rd4, 16; cvt.u32.u64 %r5, %rd4;": lambda a, b: (
        (signed(a) * signed(b) + 5) % 2**64 >> 16
    ),
    "shr.s32 %r5, %r3, 40;": lambda a, b: signed(a) >> 31,
    "shr.u32 %r5, %r3, 40;": lambda a, b: 0,
    "shl.b32 %r5, %r3, %r4;": lambda a, b: a << b if b < 32 else 0,
    "shf.r.wrap.b32 %r5, %r3, %r4, 7;": lambda a, b: (b << 32 | a) >> 7,
    "shf.l.wrap.b32 %r5, %r3, %r4, 39;": lambda a, b: (b << 32 | a) << 7 >> 32,
    "bfi.b32 %r5, %r3, %r4, 5, 9;": lambda a, b: b & ~(511 << 5) | (a & 511) << 5,
    "bfe.u32 %r5, %r3, 5, 9;": lambda a, b: a >> 5 & 511,
    "bfe.s32 %r5, %r3, 5, 9;": lambda a, b: signed(a >> 5 & 511, 9),
    "prmt.b32 %r5, %r3, %r4, 0x7540;": lambda a, b: a & 255 | (b & 255) << 8 | (b >> 8 & 255) << 16 | b >> 24 << 24,
    "lop3.b32 %r5, %r3, %r4, %r0, 0xe8;": lambda a, b: a & b,  # majority, where t = 0
    "popc.b32 %r5, %r3;": lambda a, b: a.bit_count(),
    "clz.b32 %r5, %r3;": lambda a, b: 32 - a.bit_length(),
    "brev.b32 %r5, %r3;": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "setp.lt.s32 %p1|%p2, %r3, %r4; selp.b32 %r5, 7, 9, %p2;": lambda a, b: 9 if signed(a) < signed(b) else 7,
    "setp.hs.u32 %p1, %r3, %r4; @!%p1 bra $M; mov.u32 %r5, 1; bra.uni $N; $M: mov.u32 %r5, 2; $N: ": lambda a, b: (
        1 if a >= b else 2
    ),
    "cvt.u16.u32 %rs1, %r3; cvt.s32.s16 %r5, %rs1;": lambda a, b: signed(a & 0xFFFF, 16),
    "mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r5, {%rs2, %rs1};": lambda a, b: a >> 16 | a << 16,
    "min.s32 %r5, %r3, %r4;": lambda a, b: min(signed(a), signed(b)),
    "rem.s32 %r5, %r3, 7;": lambda a, b: int(np.fmod(signed(a), 7)),
}


@pytest.mark.parametrize("body", ARITHMETIC)
def test_arithmetic(machine, body):
    pairs = np.random.default_rng(0).integers(0, 2**32, (20, 2), np.uint32)
    pairs = np.concatenate([pairs, [[0, 0], [2**31, 1], [2**32 - 1, 31], [5, 2**31]]]).astype(np.uint32)
    for a, b in pairs.tolist():
        text = f"ld.global.v2.u32 {{%r3, %r4}}, [%rd0]; {body} st.global.u32 [%rd1], %r5; ret;"
        found, out = run(machine, text, np.uint32([a, b]), threads=1)
        assert not found
        assert out[0] == ARITHMETIC[body](a, b) % 2**32, (a, b)


@pytest.mark.parametrize(
    "mode, source", {"up": lambda t: t - 3, "down": lambda t: t + 3, "bfly": lambda t: t ^ 3}.items()
)
def test_shuffles(machine, mode, source):
    clamp = 0 if mode == "up" else 31
    body = f"shfl.sync.{mode}.b32 %r3|%p1, %r0, 3, {clamp}, -1; selp.b32 %r3, %r3, 99, %p1;"
    body += "st.global.u32 [%rd1], %r3; ret;"
    found, out = run(machine, body, WORDS)
    assert not found
    assert out.tolist() == [source(t) if 0 <= source(t) < 32 else 99 for t in range(32)]


def test_tensor_cores_multiply(machine):
    """ldmatrix takes a tile from shared memory, mma multiplies it; against float64."""
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((16, 16)).astype(ml_dtypes.bfloat16),
        rng.standard_normal((16, 8)).astype(ml_dtypes.bfloat16),
    )
    words = np.concatenate([a.view(np.uint32).ravel(), np.ascontiguousarray(b.T).view(np.uint32).ravel()])  # 128 + 64
    copy = "".join(f"ld.global.u32 %r3, [%rd0+{128 * k}]; st.shared.u32 [%r1+{128 * k}], %r3;\n\t" for k in range(6))
    body = f"""{copy}bar.sync 0;
	and.b32 %r4, %r0, 15; shl.b32 %r4, %r4, 5; shr.u32 %r5, %r0, 4; shl.b32 %r5, %r5, 4;
	add.s32 %r4, %r4, %r5; mov.u32 %r6, shared; add.s32 %r4, %r4, %r6;
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r4];
	and.b32 %r4, %r0, 7; shl.b32 %r4, %r4, 5; shr.u32 %r5, %r0, 3; and.b32 %r5, %r5, 1; shl.b32 %r5, %r5, 4;
	add.s32 %r4, %r4, %r5; add.s32 %r4, %r4, %r6;
	ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r14, %r15}}, [%r4+512];
	mov.f32 %f0, 0f00000000;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
		{{%f1,%f2,%f3,%f4}}, {{%r10,%r11,%r12,%r13}}, {{%r14,%r15}}, {{%f0,%f0,%f0,%f0}};
	ld.param.u64 %rd3, [kernel_param_1]; mul.wide.u32 %rd4, %r0, 8; add.s64 %rd3, %rd3, %rd4;
	st.global.v2.f32 [%rd3], {{%f1, %f2}}; st.global.v2.f32 [%rd3+256], {{%f3, %f4}}; ret;"""
    out = np.zeros((16, 8), np.float32)  # lane 4 r + c has columns 2 c and 2 c + 1 of rows r and r + 8
    found, _ = run(machine, body, words, out=out)
    assert not found
    np.testing.assert_allclose(out, a.astype(float) @ b.astype(float), rtol=0, atol=2e-6)


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_atomics_need_no_order_and_all_count(machine, order):
    body = """mov.u32 %r6, shared; setp.ne.u32 %p1, %r0, 0; @%p1 bra $L; st.shared.u32 [%r6], 5; $L: bar.sync 0;
	red.shared.add.u32 [%r6], %r0; bar.sync 0; ld.shared.u32 %r7, [%r6]; st.global.u32 [%rd1], %r7;
	bar.sync 0; atom.global.max.u32 %r8, [%rd1], 9999; ret;"""
    found, out = run(machine, body, WORDS, order=order, threads=64)
    assert not found
    assert out.tolist() == [9999] * 64
    found, _ = run(machine, body.replace("bar.sync 0;\n", "\n", 1), WORDS, order=order, threads=64)
    assert re.search("no barrier stands between|nobody wrote", found)
