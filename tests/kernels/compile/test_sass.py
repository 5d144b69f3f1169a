"""What is read from a disassembler's listing: of a few instructions, and of a cubin that ptxas makes here."""

from __future__ import annotations

import pytest
import sass


def code(*lines: str) -> sass.Code:
    """A kernel of these instructions; it lies behind another one, so that it begins at 0x20."""
    listed = enumerate(("NOP", "NOP", *lines))
    text = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in listed)
    return sass.read(text, [2, len(lines)])[1]


@pytest.mark.parametrize(
    ("lines", "waits"),
    [
        (("LDC R1, c[0x0][0x28]", "CCTL.E.PF2 [R2]", "ACQBULK", "LDG.E R2, desc[UR4][R2.64]"), True),
        (("IMAD R1, R2, R3, R4", "LDG.E R2, desc[UR4][R2.64]", "ACQBULK"), False),
        (("@!P0 LDG.E R2, desc[UR4][R2.64]", "ACQBULK"), False),
        (("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "ACQBULK"), False),
        (("UTMALDG.2D [UR8], [UR6]", "ACQBULK"), False),
        (("ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R5", "ACQBULK"), False),
        (("REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5", "ACQBULK"), False),
        (("REDUX.MAX.S32 UR4, R5", "ACQBULK", "LDG.E R2, desc[UR4][R2.64]"), True),
        (("STG.E desc[UR4][R2.64], R5", "ACQBULK"), False),
        (("CCTL.IVALL", "ACQBULK"), False),
        (("PREEXIT", "ACQBULK"), False),
        (("@P0 EXIT", "ACQBULK"), False),
        (("@P0 BRA 0x50", "ACQBULK", "NOP", "NOP"), False),
        (("NOP", "ACQBULK", "@P0 BRA 0x30"), False),
        (("NOP", "ACQBULK", "@P0 BRA P1, 0x30"), False),
        (("NOP", "ACQBULK", "NOP", "@P0 BRA 0x40"), True),
        (("NOP", "ACQBULK", "BRX R4 -0x30"), False),
        (("BREV R4, R5", "ACQBULK", "WARPSYNC 0x30"), True),
        (("NOP", "ACQBULK", "WARPSYNC.COLLECTIVE R4, 0x30"), False),
        (("@P0 ACQBULK", "LDG.E R2, desc[UR4][R2.64]"), False),
        (("NOP", "EXIT"), False),
    ],
)
def test_what_counts_as_waiting_first(lines: tuple[str, ...], waits: bool) -> None:
    assert sass.waits_first(code(*lines)) is waits


STORE, BARRIER, FENCE, COUNT, FRESH = (
    "STG.E desc[UR4][R2.64], R5", "BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 MEMBAR.ALL.GPU",
    "@P1 ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R5", "@P1 CCTL.IVALL",
)  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "counts"),
    [
        ((STORE, BARRIER, "NOP", FENCE, COUNT, FRESH, STORE), True),
        ((STORE, BARRIER, FENCE, COUNT, FRESH, STORE, BARRIER, FENCE, COUNT, FRESH), True),
        ((STORE, BARRIER), True),
        ((STORE, FENCE, COUNT, FRESH), False),
        ((BARRIER, STORE, FENCE, COUNT, FRESH), False),
        ((STORE, BARRIER, COUNT, FRESH), False),
        ((STORE, BARRIER, FENCE, COUNT), False),
        ((STORE, BARRIER, "MEMBAR.ALL.CTA", COUNT, FRESH), False),
        ((STORE, BARRIER, FENCE, "REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5", FRESH), False),
        ((STORE, BARRIER, FENCE, COUNT, FRESH, STORE, FENCE, COUNT, FRESH), False),
    ],
)
def test_what_counts_itself_after_it_has_stored(lines: tuple[str, ...], counts: bool) -> None:
    assert sass.counts_after(code(*lines)) is counts


def test_the_loop_of_products_is_found() -> None:
    """Around it another loop, beside it one without products, in it a wait, and a tile's end that is jumped over."""
    lines = (
        "BRA 0x40", "IADD3 R1, R2, R3, R4", "NOP",
        "IMAD R1, R2, R3, R4",  # 0x50: the loop
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0", "@!P0 BRA 0x60", "QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24",
        "@P3 BRA 0xc0", "STG.E.128 [R1], R2", "STG.E.128 [R1], R2",
        "@P1 BRA 0x50",  # 0xc0
        "NOP", "@P2 BRA 0x30", "LDG.E R2, desc[UR4][R2.64]", "@P0 BRA 0xf0",
    )  # fmt: skip
    assert sass.loop_of(code(*lines)) == 6
    assert sass.loop_of(code(*(line.replace("QGMMA", "FFMA") for line in lines))) == 0


def test_a_first_factor_in_registers_is_named() -> None:
    first, second = code("HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24", "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8]")
    assert (first.name, second.name) == ("HGMMA.64x16x16.F32.BF16.RS", "HGMMA.64x16x16.F32.BF16")


def test_a_kernel_is_the_same_wherever_it_lies() -> None:
    lines = [f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(("BRX R4 -0x10", "BRA 0x0", "NOP"))]
    lines += ["        /*0030*/    BRX R4 -0x10 ;", "        /*0040*/    BRA 0x30 ;", "        /*0050*/    NOP ;"]
    first, second = sass.read("\n".join(lines), [3, 3])
    assert first == second


def test_a_listing_that_is_not_wholly_read_is_refused() -> None:
    with pytest.raises(RuntimeError, match="lists 1 instructions that can be read, of 2"):
        sass.read("        /*0000*/    NOP ;\n        /*0010*/    ?? ;\n", [2])
