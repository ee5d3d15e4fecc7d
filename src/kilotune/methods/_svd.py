"""Factors of the SVD of a layer's own weight, frozen: made once for all the adapters of a model, and known again.

::

    W = U S V^T, or Q R (float64)  ──►  A (r, in), B (out, r), float32      Split: which, and where S goes
    claim: a WeightSource, equal for equal weights, rank and way to the factors, is held by the model's Projections
    Fingerprint: 8 numbers of all the factors of an adapter, in the place of the factors in its file

An adapter whose file has no factors has them made again from the base that it is loaded into. That gives the same
factors as long as the SVD is well posed. A singular vector is determined up to its sign, which is fixed here, and
moves by about the error of the arithmetic over the gap to the next singular value. Float64 has 2e-16 of error, some
2e-13 with what a large matrix makes of it; TIE, 2^-20 of the largest value, keeps the vectors to 2e-7. Values closer
than that tie (:meth:`Svd.ties`), and are refused unless the factors go into the file.

The fingerprint is no checksum. TOLERANCE is 2^-9 of the length of a vector: bfloat16 rounds numbers by up to that, so a
layer that computes in it changes its own factors by about as much. Other arithmetic (threads, LAPACK, a GPU) moves
them by 1e-7 at most, a base in float16 mostly by less than the tolerance. Another base, a swapped order of layers, one
vector of the other sign among a million, one layer trained further, or a base in 4 bits are further away.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, gather
from ..projections.matrices import MATRIX_A, MATRIX_B, Extent, Pair, Projections, Source, StoredSource, unit_rows
from ..projections.streams import gaussians
from ._base import Site

__all__ = [
    "TIE",
    "TOLERANCE",
    "Fingerprint",
    "Split",
    "Svd",
    "WeightSource",
    "check_close",
    "check_known_again",
    "check_rank",
    "check_ties",
    "claim",
    "extents",
    "factors_checksum",
    "fingerprint_of",
    "first_qr",
    "in_file",
    "pair_of",
    "to_be_known",
    "top_svd",
]

OVERSAMPLING = 10
TIE = 2.0**-20  # of the largest singular value
TOLERANCE = 2.0**-9  # of the length of a vector
EDGE = 2.0**-30  # entries that are this near to the largest may be the one that decides the sign
DIGITS = 12  # binary ones, which the entries of some factors keep (Split)
SKETCHES = 8
SKETCH_SEED = 0
MARK = "svd1:"  # before a fingerprint, where a checksum may stand too


# -- mathematics -------------------------------------------------------------------------------------


@final
class Svd(NamedTuple):
    """The largest singular values and their vectors, float64 on the CPU; u (out, r), s (r,), vh (r, in).

    following: the value after these, 0 where there is none.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    following: float

    def ties(self) -> tuple[int, ...]:
        """Which values, counted from 1, are nearly the next one."""
        after = torch.cat([self.s[1:], self.s.new_tensor([self.following])])
        near = self.s - after <= TIE * self.s[0]
        return tuple(int(i) + 1 for i in near.nonzero().flatten())


def top_svd(matrix: Tensor, rank: int, iterations: int, seed: int) -> Svd:
    """The ``rank`` largest singular values and their vectors, of which the right ones have a positive largest entry.

    Of entries whose sizes are equal to rounding, the first decides the sign.

    Args:
        matrix: (out, in).
        rank: at most min(out, in).
        iterations: power iterations of the randomised SVD (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4),
            started from rows of the portable matrix U_A; 0, or a rank near the whole: the exact SVD.
        seed: of those rows.

    """
    u, s, vh = _decomposed(matrix.detach().to("cpu", torch.float64), rank, iterations, seed)
    following = float(s[rank]) if len(s) > rank else 0.0
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    size = vh.abs()
    largest = size >= (1.0 - EDGE) * size.amax(1, keepdim=True)
    first = largest.to(torch.uint8).argmax(1, keepdim=True)  # the first of them
    sign = vh.gather(1, first).sign()  # (r, 1)
    return Svd(u * sign.T, s, vh * sign, following)


def _decomposed(matrix: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    out, inn = matrix.shape
    if iterations == 0 or rank + OVERSAMPLING >= min(out, inn) // 2:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh
    start = unit_rows(seed, MATRIX_A, rank + OVERSAMPLING, inn)
    basis = torch.linalg.qr(matrix @ torch.from_numpy(start).double().T).Q  # (out, rank + 10)
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    small, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ small, s, vh


def first_qr(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first columns of Q (out, r) and rows of R (r, in) of ``matrix = Q R``, float64 on the CPU.

    Q's first columns follow from the first columns of the matrix alone. R's diagonal is not negative.

    Args:
        matrix: (out, in).
        rank: at most min(out, in).

    """
    wide = matrix.detach().to("cpu", torch.float64)
    q = torch.linalg.qr(wide[:, :rank]).Q
    r = (q.T @ wide).triu()
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    return q * sign, sign.unsqueeze(-1) * r


def _rounded(values: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2.0**DIGITS).round() * 2.0**-DIGITS, exponent).float().contiguous()


# -- the one home --------------------------------------------------------------------------------------


@final
class Split(Enum):
    """What the factors are.

    EVEN: A = S^(1/2) V^T, B = U S^(1/2). SECOND: A = V^T, B = U S, whose entries keep 12 binary digits: so the bits do
    not depend on the last digits of a machine's arithmetic (but for entries on an edge, about one in 10^9), and older
    files have a checksum of them. TRIANGULAR: no SVD; A = the first rows of R, B = the first columns of Q, of W = Q R,
    with no negative number on R's diagonal.
    """

    EVEN = "even"
    SECOND = "second"
    TRIANGULAR = "triangular"


@final
@dataclass(frozen=True)
class WeightSource(Source):
    """Factors of a weight's SVD or QR, in the holder of all that a model's adapters share.

    Equal for equal weights, whatever layer they are of, and whatever becomes of a weight later: an adapter keeps the
    factors that it was added with, and one that is added after a change of the weight gets those of the new one.

    weight: SHA-256 of the matrix; a name where there is none yet (on meta). rank, iterations, seed: see
    :func:`top_svd`; both 0 for a QR. pair: a (r, in) and b (r, out); None on meta. ties: see :meth:`Svd.ties`.
    """

    rank: int
    iterations: int
    seed: int
    split: Split
    weight: str = ""
    pair: Pair | None = field(default=None, compare=False, repr=False)
    ties: tuple[int, ...] = field(default=(), compare=False)

    @property
    def known(self) -> bool:
        return self.pair is not None

    def made(self, matrix: Tensor) -> WeightSource:
        """The same with the factors of ``matrix`` (out, in)."""
        if self.split is Split.TRIANGULAR:
            q, r = first_qr(matrix, self.rank)
            return replace(self, pair=Pair(r.float().contiguous(), q.T.float().contiguous()))
        found = top_svd(matrix, self.rank, self.iterations, self.seed)
        if self.split is Split.SECOND:
            a, b = _rounded(found.vh), _rounded((found.u * found.s).T)
        else:
            root = found.s.sqrt()
            a, b = (root.unsqueeze(-1) * found.vh).float(), (found.u * root).T.float()
        return replace(self, pair=Pair(a.contiguous(), b.contiguous()), ties=found.ties())

    def build(self, extent: Extent) -> Pair:
        if self.pair is None:
            raise ConfigError(
                f"the weight of {self.weight!r} was on the meta device when the adapter was added, so its factors "
                "were never made; load the base's weights first, and then add the adapter, or load it"
            )
        return self.pair

    def gain(self, rank: int, inn: int) -> float:
        return 1.0


def claim(
    sites: Sequence[Site],
    like: Callable[[Site], WeightSource],
    projections: Projections,
    keys: tuple[str, str] | None,
    otherwise: str,
) -> dict[str, Source]:
    """The source of each site's factors by its name: a file's, the one held for another adapter, or one made now.

    Args:
        sites: their weights are read, whole, where no file brought the factors.
        like: rank, iterations, seed and split for a site; ``weight`` is filled in here.
        projections: the model's holder; the caller requires there what is returned (:func:`extents`).
        keys: how a file calls A (r, in) and B (out, r); None: no file has them.
        otherwise: what else there is, for the error.

    Raises:
        ConfigError: a weight is all zeros, or not finite.

    """
    made: dict[str, Source] = {}
    fresh: dict[WeightSource, WeightSource] = {}
    for site in sites:
        if keys is not None and keys[0] in site.brought:
            made[site.name] = StoredSource.of(*(site.brought[key] for key in keys))
            continue
        if site.device().type == "meta":
            made[site.name] = replace(like(site), weight=site.name)
            continue
        weight = site.whole().detach()
        finite = bool(torch.isfinite(weight).all())
        if not finite or not bool(weight.any()):
            what = "is all zeros" if finite else "holds values that are not finite"
            raise ConfigError(f"the weight of {site.name!r} {what}, so it gives no factors; {otherwise}")
        wanted = replace(like(site), weight=_digest(weight))
        found = fresh.get(wanted) or projections.held(wanted)
        made[site.name] = fresh[wanted] = wanted.made(weight) if found is None else found
    return made


def extents(sites: Sequence[Site], sources: Mapping[str, Source], rank: Callable[[Site], int]) -> dict[Source, Extent]:
    """What an adapter needs of the holder for its sites' factors."""
    return {sources[site.name]: Extent(rank(site), site.inn, site.out) for site in sites}


def _digest(weight: Tensor) -> str:
    """SHA-256 of a matrix: exact, whatever has written into it, and nothing beside the time of an SVD."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)};".encode())
    for rows in torch.split(weight, max(1, 2**24 // max(weight.shape[1], 1))):
        digest.update(rows.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pair_of(source: Source) -> Pair:
    """The factors as they are defined, float32 on the CPU: a (r, in), b (r, out)."""
    return source.pair if isinstance(source, StoredSource) else source.build(Extent(0, 0, 0))


def in_file(sites: Sequence[Site], sources: Mapping[str, Source], first: str, second: str) -> dict[str, Tensor]:
    """A (r, in) and B (out, r) of these sites as ``<site>.<first>`` and ``<site>.<second>``; no data where on meta."""
    made = {}
    for site in sites:
        source = sources[site.name]
        if isinstance(source, WeightSource) and not source.known:
            blank = torch.zeros((), device="cpu")
            a, b = blank.expand(source.rank, site.inn), blank.expand(site.out, source.rank)
        else:
            pair = pair_of(source)
            a, b = pair.a, pair.b.T
        made.update({f"{site.name}.{first}": a, f"{site.name}.{second}": b})
    return made


def check_rank(rank: int, sites: Sequence[Site], otherwise: str) -> None:
    """Refuse a rank that a weight does not have.

    Raises:
        ConfigError: all layers that lack it.

    """
    faults = [f"{site.name!r}: ({site.out}, {site.inn})" for site in sites if rank > min(site.out, site.inn)]
    if faults:
        raise ConfigError(gather(f"r = {rank} is more than the SVD of these layers has; {otherwise}:", faults))


def check_ties(sources: Mapping[str, Source], otherwise: str) -> None:
    """Refuse factors that another machine could not make again.

    Raises:
        ConfigError: all layers whose singular values nearly tie.

    """
    tied = {name: source.ties for name, source in sources.items() if isinstance(source, WeightSource) and source.ties}
    if tied:
        faults = [f"{name!r}: number {', '.join(map(str, places))}" for name, places in tied.items()]
        raise ConfigError(
            gather(
                f"singular values of these weights are nearly the next ones (closer than {TIE:.0e} of the largest), so "
                f"their vectors are not determined, and would come out otherwise elsewhere; {otherwise}:",
                faults,
            )
        )


# -- known again ---------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Fingerprint:
    """What the factors of an adapter are known by: 8 random sums over all of them (float32).

    Each is a sum over sites and vectors of ``c <g, v> + c' <g', u> + c'' log2 s``, over the root of the number of
    vectors; the c, g are portable random numbers of variance 1. Where vectors move by e of their length, the sums move
    by about e.
    """

    sums: tuple[float, ...]

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Fingerprint:
        """Of the sites' factors, a (r, in) and b (r, out), in order."""
        widths = max(pair.a.shape[1] for pair in pairs), max(pair.b.shape[1] for pair in pairs)
        first, second = (
            torch.from_numpy(unit_rows(SKETCH_SEED, which, SKETCHES, width)).double() * math.sqrt(3.0)  # (8, width)
            for which, width in zip((MATRIX_A, MATRIX_B), widths)
        )
        total = torch.zeros(SKETCHES, dtype=torch.float64)
        for index, pair in enumerate(pairs):
            a, b = pair.a.detach().cpu().double(), pair.b.detach().cpu().double()
            rank = a.shape[0]
            lengths_a, lengths_b = a.norm(dim=1), b.norm(dim=1)  # (r,); their product is the singular value
            own = gaussians(SKETCH_SEED, index, 0, 3 * SKETCHES * rank).reshape(3, SKETCHES, rank)
            c = torch.from_numpy(own).double()
            total += (c[0] * (first[:, : a.shape[1]] @ (a / lengths_a.unsqueeze(-1)).T)).sum(1)
            total += (c[1] * (second[:, : b.shape[1]] @ (b / lengths_b.unsqueeze(-1)).T)).sum(1)
            total += c[2] @ (lengths_a * lengths_b).log2()
        vectors = sum(2 * pair.a.shape[0] for pair in pairs)
        return cls(tuple((total / math.sqrt(vectors)).tolist()))

    @classmethod
    def read(cls, text: str) -> Fingerprint | None:
        """Of what :meth:`write` made; None for anything else, such as a checksum.

        Raises:
            CheckpointError: it begins as one, and is none.

        """
        if not text.startswith(MARK):
            return None
        try:
            values = np.frombuffer(base64.b64decode(text.removeprefix(MARK) + "=", validate=True), dtype="<f4")
        except (ValueError, binascii.Error):
            values = np.zeros(0, dtype="<f4")
        if len(values) != SKETCHES or not np.isfinite(values).all():
            raise CheckpointError(f"a fingerprint of factors: expected {SKETCHES} numbers after {MARK!r}, got {text!r}")
        return cls(tuple(values.astype(float).tolist()))

    def write(self) -> str:
        """As a file has it: 48 characters."""
        return MARK + base64.b64encode(np.asarray(self.sums, dtype="<f4").tobytes()).decode().removesuffix("=")

    def distance(self, other: Fingerprint) -> float:
        """About by how much of their length the vectors have moved."""
        return math.sqrt(sum((a - b) ** 2 for a, b in zip(self.sums, other.sums, strict=True)) / SKETCHES)


def fingerprint_of(sources: Mapping[str, Source]) -> str:
    """As a file has it, of the factors in the adapter's order of its layers; of zeros where they are on meta."""
    if not all(source.known for source in sources.values()):
        return Fingerprint((0.0,) * SKETCHES).write()
    return Fingerprint.of([pair_of(source) for source in sources.values()]).write()


def to_be_known(expected: str | None, sources: Mapping[str, Source]) -> tuple[str | None, str | None]:
    """An older file's checksum, or the fingerprint, of factors that are not in the file that is written.

    An adapter that was loaded keeps what its file said (``expected``), so that it cannot drift from its training,
    however often it is rewritten.
    """
    if expected is not None and Fingerprint.read(expected) is None:
        return expected, None
    return None, expected or fingerprint_of(sources)


def check_known_again(method: str, expected: str, sources: Mapping[str, Source]) -> None:
    """Refuse factors that are not those that a file's fingerprint, or an older one's checksum, was taken of.

    Args:
        method: for the error.
        expected: what the file says.
        sources: of the factors made here, in the adapter's order of its layers.

    Raises:
        CheckpointError: with how far they are apart.

    """
    if not all(source.known for source in sources.values()):
        raise CheckpointError(f"{method}: the file holds no factors, and a base on the meta device has none to make")
    pairs = {name: pair_of(source) for name, source in sources.items()}
    fingerprint = Fingerprint.read(expected)
    if fingerprint is None:
        if (actual := factors_checksum(pairs)) == expected:
            return
        apart = f"expected SHA-256 {expected}, got {actual}"
    else:
        if (distance := fingerprint.distance(Fingerprint.of(list(pairs.values())))) <= TOLERANCE:
            return
        apart = f"they differ by {distance:.2g} of their length, and up to {TOLERANCE:.2g} would be rounding"
    raise CheckpointError(
        f"{method}: the factors made from this base are not those of the training ({apart}): other weights, another "
        "dtype or quantisation of them, other layers or another order of them. Load the adapter where it was trained, "
        "and save it with save_factors=True"
    )


def check_close(a: Tensor, b: Tensor, pair: Pair, name: str) -> None:
    """Refuse factors A (r, in), B (out, r) of a file that are not those of ``pair``, up to TOLERANCE.

    Raises:
        CheckpointError: with how far they are apart.

    """
    for mine, theirs in ((a, pair.a), (b.T, pair.b)):
        here = theirs.detach().cpu().double()
        apart = (mine.detach().cpu().double() - here).norm() / here.norm()
        if not float(apart) <= TOLERANCE:
            raise CheckpointError(
                f"its factors of {name!r} are not those of this base's weight: they differ by {float(apart):.2g} of "
                f"their length, and up to {TOLERANCE:.2g} would be rounding"
            )


def factors_checksum(factors: Mapping[str, Pair]) -> str:
    """SHA-256 over the layers' names and the float32 bytes of A and B, in the order of the names: of older files."""
    digest = hashlib.sha256()
    for name in sorted(factors):
        pair = factors[name]
        for tensor in (pair.a, pair.b.T):
            digest.update(f"{name} {tuple(tensor.shape)};".encode())
            digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy(), dtype="<f4").tobytes())
    return digest.hexdigest()
