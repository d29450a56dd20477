"""The interpreter on small hand-written PTX: every kind of fault is found, and nothing where there is none."""

import numpy as np
import pytest

from ptx.launch import Result, execute, judged
from ptx.memory import Memory
from ptx.parse import Unsupported, parse
from ptx.poison import Poison
from ptx.tma import TensorMap

HEAD = (
    ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
    ".visible .entry k(.param .u64 p)\n{\nld.param.b64 %rd1, [p]; mov.u32 %r1, %tid.x;\n"
)
TAIL = "ret;\n}\n"
SCHEDULES = (None, "rising", "falling", 1)
# One word halved by thread 0 that all threads have read.
DECAY = """ld.global.b32 { %r2 }, [ %rd1 + 0 ];
BARRIER
mul.f32 %r3, %r2, 0f3F000000; setp.eq.b32 %p1, %r1, 0;
@%p1 st.global.b32 [ %rd1 + 0 ], { %r3 };
"""
# Each thread's own word of shared memory.
OWN = "shl.b32 %r8, %r1, 2; mov.b32 %r7, global_smem; add.s32 %r9, %r7, %r8;"


def run(body: str, size: int = 4, grid: tuple[int, ...] = (1,), warps: int = 4, **options) -> Result:
    memory = Memory()
    at = memory.add(np.ones(size, np.float32), "v")
    return execute(HEAD + body + TAIL, memory, [at], grid, warps, 1024, **options)


def stored(body: str, like: np.ndarray, warps: int = 1) -> np.ndarray:
    """What a body leaves in a buffer that starts as `like`."""
    memory = Memory()
    at = memory.add(like, "v")
    result = execute(HEAD + body + TAIL, memory, [at], (1,), warps, 1024)
    assert not result.faults, result.faults.lines()
    return memory.take(at, like)


STORES_TOGETHER = "and.b32 %r2, %r1, MASK; st.global.b32 [ %rd1 + 0 ], { %r2 };"
EVERY_OTHER = "xor.b32 %r2, %r8, 128; add.s32 %r2, %r7, %r2; ld.shared.b32 %r3, [%r2];"
TWICE = f"{OWN} st.shared.b32 [%r9], %r1; bar.sync 0; st.shared.b32 [%r9], %r8;"
CASES = {
    "race": (DECAY.replace("BARRIER", ""), {}, {"race"}),
    "race, but a barrier": (DECAY.replace("BARRIER", "bar.sync 0;"), {}, set()),
    "race, but one warp": (DECAY.replace("BARRIER", ""), dict(warps=1), set()),
    "race in shared memory": (f"{TWICE} {EVERY_OTHER}", {}, {"race"}),
    "shared memory, but a barrier": (f"{TWICE} bar.sync 0; {EVERY_OTHER}", {}, set()),
    "programs": (DECAY.replace("BARRIER", "bar.sync 0;"), dict(grid=(2,)), {"programs"}),
    "programs that only read": ("ld.global.b32 {%r2}, [%rd1];", dict(grid=(3,)), set()),
    "aligned": ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1+4];", dict(size=8), {"aligned"}),
    "bounds": ("ld.global.b32 {%r2}, [%rd1+16];", {}, {"bounds"}),
    "bounds in shared memory": ("mov.u32 %r2, 1024; st.shared.b32 [%r2], %r1;", {}, {"bounds"}),
    "all store one value": (STORES_TOGETHER.replace("MASK", "0"), {}, set()),
    "warps store their own values": (STORES_TOGETHER.replace("MASK", "32"), {}, {"race"}),
    "lanes store their own values": (STORES_TOGETHER.replace("MASK", "1"), dict(warps=1), {"race"}),
    "unwritten": ("mov.b32 %r7, global_smem; ld.shared.b32 %r2, [%r7+4];", {}, {"unwritten"}),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_faults(case, schedule):
    body, options, expected = CASES[case]
    assert run(body, **options, schedule=schedule).faults.kinds == expected


COPY = f"{OWN} cvt.u64.u32 %rd2, %r8; add.s64 %rd3, %rd1, %rd2; cp.async.ca.shared.global [%r9], [%rd3], 0x4;"
USE = "ld.shared.b32 %r2, [%r9]; st.global.b32 [%rd3], {%r2};"


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        ("cp.async.commit_group; cp.async.wait_group 0;", set()),
        ("cp.async.commit_group; cp.async.wait_group 1;", {"async", "unwritten"}),
        ("cp.async.wait_group 0;", {"async", "unwritten"}),
        ("cp.async.commit_group;", {"async", "unwritten"}),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_asynchronous_copies(waits, expected, schedule):
    assert run(COPY + waits + USE, 128, schedule=schedule).faults.kinds == expected


def test_others_see_a_copy_only_behind_a_barrier():
    waited = COPY + "cp.async.commit_group; cp.async.wait_group 0; BARRIER" + EVERY_OTHER
    assert run(waited.replace("BARRIER", ""), 128).faults.kinds == {"race"}
    assert run(waited.replace("BARRIER", "bar.sync 0;"), 128).faults.kinds == set()


def test_what_a_copy_leaves_out_is_zero():
    body = COPY.replace("0x4;", "0x4, %r5;").replace(
        "cp.async", "shl.b32 %r5, %r1, 2; and.b32 %r5, %r5, 4; cp.async", 1
    )
    body += "cp.async.commit_group; cp.async.wait_group 0;" + USE
    assert stored(body, np.arange(32, dtype=np.uint32)).tolist() == [i * (i % 2) for i in range(32)]


BOX = """setp.eq.b32 %p1, %r1, 0; mov.u32 %r7, 0; mov.u32 %r6, 512;
@%p1 mbarrier.init.shared::cta.b64 [%r6], 1;
FENCE
bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], 256;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r7], [%rd9, {%r7, %r7}], [%r6];
{
.reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared::cta.b64 complete, [%r6], PARITY;
@!complete bra.uni waitLoop;
}
shl.b32 %r8, %r1, 2; ld.shared.b32 %r2, [%r8]; cvt.u64.u32 %rd2, %r8; add.s64 %rd3, %rd1, %rd2;
st.global.b32 [%rd3], {%r2};
"""
BOX_HEAD = HEAD.replace("(.param .u64 p)", "(.param .u64 p, .param .align 64 .b8 m[128])")


def copied_box(body: str, schedule=None) -> tuple[Result, np.ndarray]:
    """A matrix (3, 40) whose first box of 2 rows of 32 words is brought in and stored in one piece."""
    memory = Memory()
    matrix = np.arange(120, dtype=np.uint32).reshape(3, 40)
    out, at = memory.add(np.zeros(64, np.uint32), "out"), memory.add(matrix, "matrix")
    text = BOX_HEAD + "cvta.param.u64 %rd9, m;" + body + TAIL
    result = execute(text, memory, [out, TensorMap(at, 3, 40, 4, (2, 32))], (1,), 2, 1024, schedule=schedule)
    return result, memory.take(out, np.zeros((2, 8, 4), np.uint32))


GOOD_BOX = BOX.replace("FENCE", "fence.proxy.async.shared::cta;").replace("PARITY", "%r7")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_box_arrives_swizzled(schedule):
    result, got = copied_box(GOOD_BOX, schedule)
    assert not result.faults, result.faults.lines()
    # Row r's 16-byte pieces change places with those whose number differs in the bits of r.
    wanted = np.arange(120).reshape(3, 40)[:2, :32].reshape(2, 8, 4)
    assert (got[0] == wanted[0]).all()
    assert (got[1] == wanted[1][np.arange(8) ^ 1]).all()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("fence.proxy.async.shared::cta;", "", {"proxy"}),
        ("bar.sync 0;", "", {"race"}),
        ("[%r6], 256;", "[%r6], 260;", {"hang"}),
        ("[%r6], %r7;", "[%r6], 1;", {"hang"}),
        ("@%p1 cp.async.bulk", "mov.u32 %r7, 16; @%p1 cp.async.bulk", {"aligned"}),
    ],
)
def test_what_can_go_wrong_with_a_box(old, new, expected):
    broken = GOOD_BOX.replace(old, new)
    assert broken != GOOD_BOX
    result, _ = copied_box(broken)
    assert result.faults.kinds >= expected, result.faults.lines()


def test_a_wait_lets_the_warp_that_copies_go_on():
    """With the barrier behind the copy gone, falling order waits first and must come back."""
    result, _ = copied_box(GOOD_BOX, "falling")
    assert not result.faults


def wgmma(before_use: str = "wgmma.wait_group.sync.aligned 0;", fence: str = "fence.proxy.async.shared::cta;") -> str:
    """m64n8k16 of zeros in swizzled shared memory: 4 warps, 4 sums each."""
    descriptor = (2 << 62) | (32 << 32)  # 64-byte rows, groups of 8 rows 512 bytes apart
    sums = "{%r20, %r21, %r22, %r23}"
    return f"""mov.u32 %r2, 0; shl.b32 %r8, %r1, 3;
st.shared.v2.b32 [%r8], {{%r2, %r2}}; st.shared.v2.b32 [%r8+1024], {{%r2, %r2}};
st.shared.v2.b32 [%r8+2048], {{%r2, %r2}}; st.shared.v2.b32 [%r8+3072], {{%r2, %r2}};
{fence} bar.sync 0;
mov.b32 %r20, 0f3F800000; mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
mov.b64 %rd5, {descriptor}; mov.pred %p2, -1;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {sums}, %rd5, %rd5, %p2, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
{before_use}
mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], {{%r20}};
"""


def product(body: str, schedule=None) -> tuple[set[str], np.ndarray]:
    memory = Memory()
    at = memory.add(np.zeros(128, np.float32), "out")
    result = execute(HEAD + body + TAIL, memory, [at], (1,), 4, 4096, schedule=schedule)
    return result.faults.kinds, memory.take(at, np.zeros(128, np.float32))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sums_of_a_product_are_there_behind_its_wait(schedule):
    faults, got = product(wgmma(), schedule)
    assert faults == set()
    assert (got == 1).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(before_use=""), {"async"}),
        (dict(before_use="wgmma.wait_group.sync.aligned 1;"), {"async"}),
        (dict(before_use="add.f32 %r20, %r20, %r20; wgmma.wait_group.sync.aligned 0;"), {"async"}),
        (dict(before_use="st.shared.b32 [%r8], %r2; wgmma.wait_group.sync.aligned 0;"), {"async"}),
        (dict(fence=""), {"proxy"}),
    ],
)
def test_what_can_go_wrong_with_a_product(options, expected):
    assert product(wgmma(**options))[0] >= expected


LEFT_OUT = """.loc 1 7 3
setp.lt.u32 %p1, %r1, 16; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; mov.u32 %r2, 0x0;
@%p1 ld.global.b32 { %r2 }, [ %rd3 ];
.loc 1 8 3
"""
FILES = '.file 1 "x.py"\n'


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("st.global.b32 [%rd3], {%r2};", {"masked"}),
        ("@%p1 st.global.b32 [%rd3], {%r2};", set()),
        ("selp.b32 %r3, %r2, 0, %p1; st.global.b32 [%rd3], {%r3};", set()),
        ("add.s32 %r3, %r2, 1; st.global.b32 [%rd3], {%r3};", {"masked"}),
        ("and.b32 %r3, %r2, 0; st.global.b32 [%rd3], {%r3};", set()),
        ("setp.gt.u32 %p2, %r2, 5; and.pred %p3, %p2, %p1; @%p3 st.global.b32 [%rd3], {%r1};", set()),
        ("setp.gt.u32 %p2, %r2, 5; @%p2 st.global.b32 [%rd3], {%r1};", {"masked"}),
        (f"{OWN} st.shared.b32 [%r9], %r2; ld.shared.b32 %r4, [%r9]; st.global.b32 [%rd3], {{%r4}};", {"masked"}),
        (f"{OWN} st.shared.b32 [%r9], %r2; ld.shared.b32 %r4, [%r9]; @%p1 st.global.b32 [%rd3], {{%r4}};", set()),
        ("shfl.sync.bfly.b32 %r4, %r2, 16, 31, -1; @%p1 st.global.b32 [%rd3], {%r4};", {"masked"}),
    ],
)
def test_lanes_that_a_load_left_out(use, expected):
    memory = Memory()
    at = memory.add(np.ones(32, np.float32), "v")
    poison = Poison(frozenset({("x.py", 7, 3)}))
    result = execute(HEAD + LEFT_OUT + use + TAIL + FILES, memory, [at], (1,), 1, 1024, poison=poison)
    assert result.faults.kinds == expected, result.faults.lines()


def judge(body: str) -> Result:
    memory = Memory()
    at = memory.add(np.full(4, 8, np.float32), "v")
    return judged(HEAD + body + TAIL, memory, [at], grid=(1,), warps=4, shared=1024)


def test_a_race_counts_if_an_order_of_warps_changes_a_byte():
    shows = judge(DECAY.replace("BARRIER", "") + "st.global.b32 [%rd1+4], {%r2};")
    assert {fault.kind for fault in shows.faults.found} == {"race"}
    assert not shows.formal
    # What the others read goes nowhere.
    hidden = judge(DECAY.replace("BARRIER", ""))
    assert not hidden.faults
    assert {fault.kind for fault in hidden.formal} == {"race"}


def test_which_lane_wins_counts_as_an_order():
    body = "and.b32 %r2, %r1, 1; st.global.b32 [%rd1], {%r2};"
    memory = Memory()
    at = memory.add(np.zeros(4, np.float32), "v")
    result = judged(HEAD + body + TAIL, memory, [at], grid=(1,), warps=1, shared=16)
    assert {fault.kind for fault in result.faults.found} == {"race"}


def test_what_is_not_modelled_says_so():
    with pytest.raises(Unsupported, match="fictitious"):
        run("fictitious.b32 %r2, %r1;")
    with pytest.raises(Unsupported, match="part ways"):
        run("setp.eq.b32 %p1, %r1, 0; @%p1 bra $over; mov.u32 %r2, 1; $over: mov.u32 %r3, 1;", schedule="rising")


def test_warps_that_part_ways_run_one_after_the_other():
    body = "setp.lt.u32 %p1, %r1, 32; @%p1 bra $over; st.global.b32 [%rd1], {%r1};\n$over: mov.u32 %r3, 1;"
    result = judge(body.replace("{%r1}", "{%r4}").replace("st.", "mov.u32 %r4, 5; st."))
    assert not result.faults, result.faults.lines()


def test_places_are_source_lines():
    program = parse(
        HEAD + ".loc 2 43 17 // standard.py:43:17 @[ fill_csr.py:29:28 ]\nadd.s32 %r2, %r1, 1;\n.loc 2 0 0\nret;\n}\n"
        '.file 1 "/a/fill_csr.py"\n.file 2 "/b/standard.py"\n'
    )
    assert [i.place for i in program.body[-2:]] == ["standard.py:43 in fill_csr.py:29"] * 2
    assert program.body[-1].spot == ("standard.py", 43, 17)


VALUES = np.array(
    [0x3F800000, 0xBF800000, 0x7FC00000, 0x80000000, 0x00000001, 0x4B000001, 0xFFFFFFFF, 12345], np.uint32
)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("shr.s32 %r3, %r2, 4;", lambda v: (v.view(np.int32) >> 4).view(np.uint32)),
        ("shr.u32 %r3, %r2, 40;", lambda v: v * 0),
        ("shr.s32 %r3, %r2, 40;", lambda v: (v.view(np.int32) >> 31).view(np.uint32)),
        ("bfe.u32 %r3, %r2, 4, 9;", lambda v: v >> 4 & 0x1FF),
        ("bfe.s32 %r3, %r2, 30, 2;", lambda v: (v.view(np.int32) >> 30).view(np.uint32)),
        ("prmt.b32 %r3, %r2, %r2, 0x0123;", lambda v: v.byteswap()),
        ("popc.b32 %r3, %r2;", lambda v: np.array([bin(x).count("1") for x in v], np.uint32)),
        ("div.s32 %r3, %r2, 7;", lambda v: np.trunc(v.view(np.int32) / 7).astype(np.int32).view(np.uint32)),
        ("mul.hi.u32 %r3, %r2, %r2;", lambda v: (v.astype(np.uint64) ** 2 >> np.uint64(32)).astype(np.uint32)),
        ("setp.ltu.f32 %p1, %r2, 0f00000000; selp.b32 %r3, 1, 0, %p1;", lambda v: (~(v.view("f4") >= 0)).astype("u4")),
        ("setp.lt.f32 %p1, %r2, 0f00000000; selp.b32 %r3, 1, 0, %p1;", lambda v: (v.view("f4") < 0).astype("u4")),
        ("max.NaN.f32 %r3, %r2, 0f00000000; setp.nan.f32 %p1, %r3, %r3; selp.b32 %r3, 1, 0, %p1;",
         lambda v: np.isnan(v.view("f4")).astype("u4")),
        ("max.f32 %r3, %r2, 0f3F000000; setp.nan.f32 %p1, %r3, %r3; selp.b32 %r3, 1, 0, %p1;", lambda v: v * 0),
        ("cvt.rzi.s32.f32 %r3, %r2;", lambda v: np.nan_to_num(v.view("f4")).astype(np.int32).view("u4")),
        ("cvt.rn.bf16.f32 %rs1, %r2; cvt.f32.bf16 %r3, %rs1; setp.nan.f32 %p1, %r3, %r3; selp.b32 %r3, 0, %r3, %p1;",
         lambda v: np.where(np.isnan(v.view("f4")), 0, (v + 0x7FFF + (v >> 16 & 1)) & 0xFFFF0000).astype("u4")),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};", lambda v: v << 16 | v >> 16),
        ("shfl.sync.up.b32 %r3|%p1, %r2, 1, 0, -1;", lambda v: v[[0, 0, 1, 2, 3, 4, 5, 6]]),
        ("shfl.sync.bfly.b32 %r3, %r2, 2, 31, -1;", lambda v: v[[2, 3, 0, 1, 6, 7, 4, 5]]),
    ],
)  # fmt: skip
def test_arithmetic(body, wanted):
    words = np.tile(VALUES, 4)
    address = "mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;"
    got = stored(f"{address} ld.global.b32 {{%r2}}, [%rd3];\n{body}\nst.global.b32 [%rd3], {{%r3}};", words)
    assert got[:8].tolist() == wanted(VALUES).tolist()


def test_a_fused_product_is_rounded_once():
    a = np.float32(1 + 2**-12)
    words = np.full(32, a)
    body = "mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; ld.global.b32 {%r2}, [%rd3];"
    fused = stored(body + "fma.rn.f32 %r3, %r2, %r2, 0fBF800000; st.global.b32 [%rd3], {%r3};", words)
    apart = stored(body + "mul.f32 %r3, %r2, %r2; add.f32 %r3, %r3, 0fBF800000; st.global.b32 [%rd3], {%r3};", words)
    assert fused[0] == np.float32(float(a) ** 2 - 1)
    assert apart[0] == a * a - np.float32(1) != fused[0]
