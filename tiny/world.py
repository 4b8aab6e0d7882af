"""A world in which the truth is known: captions, pictures, what is right and beautiful about them.

A picture shows one, two or three coloured shapes on a light ground. Its caption fixes the content.
Two hidden factors that no caption mentions fix how well it is *rendered*: how vivid the colours are
and how clean the ground is. So, as in Pick-a-Pic, a "generic" preference between two pictures of
one caption blends two things that often disagree (paper, sections 1 and 4.6):

    alignment   does the picture show what the caption says?   read from the pixels by a verifier
    aesthetics  is it vivid and clean?                         read from the pixels by a formula

No model is ever trained on either of these two numbers. PickScore and the step-aware preference
model see only the blended labels of `generic_preference`, and SPO sees only the latter of the two.

Shapes of tensors: N pictures, 3 channels, S x S pixels (S = 64), values in [0, 1].
"""
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

SIZE = 64
COLOURS = {  # sRGB in 0..255; hues at least 35 degrees apart, so that a pale one has a name
    "red": (226, 42, 46), "yellow": (247, 188, 20), "green": (44, 166, 62),
    "cyan": (20, 186, 196), "blue": (38, 92, 228), "purple": (154, 48, 208),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {2: "two", 3: "three"}
PALE = 0.32          # share of a colour's chroma that is left at vividness 0
BLOTCH = 0.42        # largest darkening of the ground at cleanliness 0
RGB = torch.tensor([COLOURS[c] for c in COLOURS], dtype=torch.float32) / 255


@dataclass(frozen=True)
class Caption:
    """What a picture must show: (colour, shape) of its `objects`; `relation` of first to second."""
    text: str
    kind: str                                   # "single" | "count" | "relation"
    objects: tuple[tuple[str, str], ...]
    relation: str | None = None


def all_captions() -> list[Caption]:
    """Every caption of the world: 24 singles, 48 counts and 1,920 relations, 1,992 in all."""
    things = [(c, s) for c in COLOURS for s in SHAPES]
    plural = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
    single = [Caption(f"a {c} {s}", "single", ((c, s),)) for c, s in things]
    count = [
        Caption(f"{COUNTS[n]} {c} {plural[s]}", "count", ((c, s),) * n)
        for n in COUNTS for c, s in things
    ]
    relation = [
        Caption(f"a {a[0]} {a[1]} {r} a {b[0]} {b[1]}", "relation", (a, b), r)
        for r in RELATIONS for a in things for b in things if a[0] != b[0]
    ]
    return single + count + relation


def split_captions(seed: int = 0) -> tuple[list[Caption], list[Caption]]:
    """(training captions, 256 held-out ones: 4 singles, 8 counts, 122 relations said both ways).

    "A left of B" and "B right of A" describe one scene, so they are held out together.
    """
    generator = torch.Generator().manual_seed(seed)
    captions, held = all_captions(), []
    by_text = {c.text: c for c in captions}
    for kind, share in (("single", 4), ("count", 8), ("relation", 122)):
        group = [c for c in captions if c.kind == kind and c.relation not in ("right of", "below")]
        for i in torch.randperm(len(group), generator=generator)[:share].tolist():
            held.append(group[i])
            if kind == "relation":
                (a, b), back = group[i].objects, OPPOSITE[group[i].relation]
                held.append(by_text[f"a {b[0]} {b[1]} {back} a {a[0]} {a[1]}"])
    texts = {c.text for c in held}
    return [c for c in captions if c.text not in texts], held


def draw_captions(
    count: int, generator: torch.Generator, shares: tuple[float, ...] = (0.2, 0.2, 0.6)
) -> list[Caption]:
    """`count` training captions; `shares` of singles, counts and relations."""
    train, _ = split_captions()
    kinds = [[c for c in train if c.kind == kind] for kind in ("single", "count", "relation")]
    share = torch.tensor(shares).multinomial(count, replacement=True, generator=generator)
    draw = torch.rand(count, generator=generator)
    return [kinds[k][int(u * len(kinds[k]))] for k, u in zip(share.tolist(), draw.tolist())]


def _place(caption: Caption, rand) -> list[tuple[float, float, float]]:
    """(x, y, r) in pixels, centre and radius, of a caption's objects; `rand(low, high)` draws."""
    if caption.kind == "single":
        r = rand(13, 20)
        return [(rand(r + 3, SIZE - r - 3), rand(r + 3, SIZE - r - 3), r)]
    if caption.kind == "relation":
        dx, dy = RELATIONS[caption.relation]
        near, far = [(rand(15, 19), rand(20, 44)) for _ in range(2)]
        sizes = [rand(9, 12.5) for _ in range(2)]
        halves = near[0], SIZE - far[0]         # of the axis that the relation is about
        first, second = halves if dx + dy < 0 else halves[::-1]
        if dx:
            return [(first, near[1], sizes[0]), (second, far[1], sizes[1])]
        return [(near[1], first, sizes[0]), (far[1], second, sizes[1])]
    while True:                                  # a few of a kind: anywhere, but apart
        r = rand(8, 10.5)
        spots = [(rand(r + 3, SIZE - r - 3), rand(r + 3, SIZE - r - 3), r) for _ in caption.objects]
        if all(math.dist(a[:2], b[:2]) > 2.5 * r + 2 for a, b in itertools.combinations(spots, 2)):
            return spots


def signed_distance(
    shape: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor, r: torch.Tensor
) -> torch.Tensor:
    """Pixels from a shape's edge, negative inside; `shape` indexes SHAPES. All broadcast."""
    circle = (dx.square() + dy.square()).sqrt() - r
    square = torch.maximum(dx.abs(), dy.abs()) - 0.88 * r
    slope = 1 / 1.85                                        # the triangle's half width per height
    flank = (dx.abs() - (dy + 1.05 * r) * slope) * (1 / math.hypot(1, slope))
    triangle = torch.maximum(flank, dy - 0.8 * r)
    arm = torch.maximum(dx.abs() - r, dy.abs() - 0.34 * r)
    cross = torch.minimum(arm, torch.maximum(dy.abs() - r, dx.abs() - 0.34 * r))
    return torch.where(
        shape == 0, circle,
        torch.where(shape == 1, square, torch.where(shape == 2, triangle, cross)),
    )


def render(
    captions: list[Caption],
    generator: torch.Generator,
    vividness: torch.Tensor | None = None,
    cleanliness: torch.Tensor | None = None,
    slip: torch.Tensor | None = None,
    only: slice = slice(None),
) -> torch.Tensor:
    """Draw one picture per caption, or of all these `only` some -> [N, 3, S, S] in [0, 1].

    `vividness` and `cleanliness` [N] in [0, 1]; uniform if not given. `slip` [N] in [-1, 1], a
    painter who misses the hue: the share of the colour circle's next colour (< 0: the last one's).
    """
    n = len(captions)
    vividness = torch.rand(n, generator=generator) if vividness is None else vividness
    cleanliness = torch.rand(n, generator=generator) if cleanliness is None else cleanliness
    slip = torch.zeros(n) if slip is None else slip
    places, tone, tint, blotch = chance(n, generator)
    pool = iter(places.tolist())
    names = list(COLOURS)
    rows = torch.zeros(n, 3, 5)                         # colour, shape, x, y, radius
    rows[:, :, 3] = -1e3                                # an absent object lies far away
    for i, caption in enumerate(captions):
        spots = _place(caption, lambda low, high: low + (high - low) * next(pool))
        for j, ((c, s), spot) in enumerate(zip(caption.objects, spots)):
            rows[i, j] = torch.tensor([names.index(c), SHAPES.index(s), *spot])

    rows, tone, tint, blotch, vividness, cleanliness, slip = (
        values[only] for values in (rows, tone, tint, blotch, vividness, cleanliness, slip))
    n = len(rows)
    axis = torch.arange(SIZE) + 0.5
    y, x = axis[:, None], axis[None, :]
    # The ground: light, a little darker further down, with grey blotches where it is not clean.
    tone = 0.955 + 0.03 * tone - 0.07 * (y / SIZE)
    tint = 0.012 * (tint - 0.5)
    blotch = F.interpolate(blotch, SIZE, mode="bicubic", align_corners=True)
    blotch = blotch.clamp(-1.5, 1.5) / 3 + 0.5
    image = tone + tint - BLOTCH * (1 - cleanliness.view(n, 1, 1, 1)) * blotch
    for j in range(3):
        _, shape, cx, cy, r = (v.view(n, 1, 1) for v in rows[:, j].unbind(1))
        edge = signed_distance(shape, x - cx, y - cy, r)                # [N, S, S]
        shadow = signed_distance(shape, x - cx - 1.5, y - cy - 2, r)
        image = image * (1 - 0.10 * ((2 - shadow) / 4).clamp(0, 1)[:, None])
        hue = rows[:, j, 0].long()
        pure = RGB[hue].view(n, 3, 1, 1)
        other = RGB[(hue + slip.sign().long()) % len(RGB)].view(n, 3, 1, 1)
        pure = pure + slip.abs().view(n, 1, 1, 1) * (other - pure)
        grey = pure.mean(1, keepdim=True) * 0.4 + 0.42
        strength = (PALE + (1 - PALE) * vividness).view(n, 1, 1, 1)
        light = 1 - 0.09 * ((x - cx + y - cy) / (2 * r.clamp(min=1))).clamp(-1, 1)[:, None]
        cover = (0.5 - edge).clamp(0, 1)[:, None]                       # [N, 1, S, S], anti-aliased
        image = image * (1 - cover) + cover * (grey + strength * (pure - grey)) * light
    return image.clamp(0, 1)


def chance(n: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Random numbers of n pictures: for places, and for the ground's tone, tint and blotches."""
    return (*(torch.rand(*shape, generator=generator)
              for shape in ((n * 400,), (n, 1, 1, 1), (n, 3, 1, 1))),
            torch.randn(n, 1, 5, 5, generator=generator))


@dataclass
class Thing:
    """An object that the verifier found: its names and its centre in pixels."""
    colour: str
    shape: str
    x: float
    y: float


@functools.cache
def _templates(side: int = 24) -> torch.Tensor:
    """Each shape's mask, stretched to its own bounding box -> [4, side * side]."""
    axis = torch.arange(96) - 47.5
    shape = torch.arange(len(SHAPES)).view(-1, 1, 1)
    masks = signed_distance(shape, axis[None, :], axis[:, None], torch.tensor(36.0)) < 0
    return torch.stack([_fit(mask, side) for mask in masks])


def _fit(mask: torch.Tensor, side: int = 24) -> torch.Tensor:
    """Cut a [S, S] boolean mask to its bounding box and stretch it -> [side * side] in [0, 1]."""
    ys, xs = mask.any(1).nonzero(), mask.any(0).nonzero()
    box = mask[None, None, int(ys[0]):int(ys[-1]) + 1, int(xs[0]):int(xs[-1]) + 1].float()
    return F.interpolate(box, (side, side), mode="bilinear", align_corners=False).flatten()


def _chroma(images: torch.Tensor) -> torch.Tensor:
    """Largest minus smallest channel of [N, 3, ...] -> [N, ...]; grey is 0."""
    return images.amax(1) - images.amin(1)


def _direction(images: torch.Tensor) -> torch.Tensor:
    """The hue of [N, 3, ...] as a unit vector across the grey axis -> [N, 3, ...]."""
    return F.normalize(images - images.mean(1, keepdim=True), dim=1)


def _dilate(maps: torch.Tensor, reach: int) -> torch.Tensor:
    """The largest value of [N, S, S], none negative, within `reach` pixels each way.

    One axis after the other: five times as fast as max_pool2d.
    """
    padded = F.pad(maps, (reach,) * 4)
    for axis in (1, 2):
        size = padded.shape[axis] - 2 * reach
        padded = functools.reduce(
            torch.maximum, (padded.narrow(axis, i, size) for i in range(2 * reach + 1))
        )
    return padded


def _components(mask: torch.Tensor) -> torch.Tensor:
    """Number the connected regions of each boolean mask [N, S, S]; 0 is the ground."""
    n, h, w = mask.shape
    label = torch.arange(1, h * w + 1, dtype=torch.float32).view(1, h, w) * mask
    while True:                                  # the largest label floods its region
        spread = _dilate(label, 1) * mask
        if torch.equal(spread, label):
            return label.long()
        label = spread


def find_things(images: torch.Tensor) -> list[list[Thing]]:
    """Read the objects of each picture [N, 3, S, S] from its pixels alone.

    Coloured regions are cut out by chroma, named by hue, and matched with each shape's template.
    """
    images = images.float().clamp(0, 1)
    labels = _components(_chroma(images) > 0.11)
    templates = _templates()
    hues, names = _direction(RGB), list(COLOURS)
    found = []
    for image, label in zip(images, labels):
        things = []
        for value in label.unique().tolist():
            region = label == value
            if value == 0 or region.sum() < 24:
                continue
            mean = image[:, region].mean(1)
            colour = names[int((hues @ F.normalize(mean - mean.mean(), dim=0)).argmax())]
            mask = _fit(region)
            overlap = torch.minimum(templates, mask).sum(1) / torch.maximum(templates, mask).sum(1)
            ys, xs = region.nonzero().float().unbind(1)
            wide, high = xs.max() - xs.min() + 1, ys.max() - ys.min() + 1
            shape = SHAPES[int(overlap.argmax())]
            if overlap.max() < 0.6 or not 0.6 < wide / high < 1.65:
                shape = "blob"
            things.append(Thing(colour, shape, float(xs.mean()), float(ys.mean())))
        found.append(things)
    return found


def fulfils(things: list[Thing], caption: Caption) -> bool:
    """True if exactly the caption's objects are there and stand as it says."""
    same = sorted((t.colour, t.shape) for t in things) == sorted(caption.objects)
    if not same or caption.kind != "relation":
        return same
    first, second = (next(t for t in things if (t.colour, t.shape) == o) for o in caption.objects)
    return stands(first, second, caption.relation)


def stands(first: Thing, second: Thing, relation: str) -> bool:
    """Is the first clearly `relation` ("left of", ...) the second?"""
    dx, dy = RELATIONS[relation]
    x, y = first.x - second.x, first.y - second.y
    along, across = (x, y) if dx else (y, x)
    return along * (dx + dy) > 6 and abs(along) > 0.5 * abs(across)


def geneval(things: list[Thing], caption: Caption) -> dict[str, bool]:
    """This world's GenEval (paper, Table 3): what a picture gets right of its caption, by tag.

    single, counting, two: the shapes, whatever their colours. colours, binding: each shape in its
    own colour. position: the two shapes as the relation says, whatever their colours.
    """
    shapes, wanted = [t.shape for t in things], [s for _, s in caption.objects]
    coloured = [(t.colour, t.shape) for t in things]
    there = all(shapes.count(s) >= wanted.count(s) for s in wanted)
    bound = all(coloured.count(o) >= caption.objects.count(o) for o in caption.objects)
    if caption.kind == "single":
        return dict(single=there, colours=bound)
    if caption.kind == "count":
        return dict(counting=shapes.count(wanted[0]) == len(wanted))
    placed = any(
        [a.shape, b.shape] == wanted and stands(a, b, caption.relation)
        for a, b in itertools.permutations(things, 2)
    )
    return dict(two=there, position=placed, binding=bound)


def alignment(images: torch.Tensor, captions: list[Caption]) -> torch.Tensor:
    """1 where a picture [N, 3, S, S] shows exactly what its caption says, else 0 -> [N]."""
    return torch.tensor([float(fulfils(t, c)) for t, c in zip(find_things(images), captions)])


def aesthetics(images: torch.Tensor) -> torch.Tensor:
    """5 x (vividness + cleanliness) of [N, 3, S, S] -> [N] in 0..10; blind to the caption."""
    images = images.float().clamp(0, 1)
    mask = (_chroma(images) > 0.11).float()
    return 5 * (_vividness(images, mask) + _cleanliness(images, mask))


def _vividness(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Chroma of the coloured pixels, as a share of their colour's full one -> [N] in 0..1."""
    inner = 1 - _dilate(1 - mask, 1)                                    # no anti-aliased edge
    hue = images - images.mean(1, keepdim=True)                         # its length does not matter
    likeness = torch.einsum("kc,nchw->nkhw", _direction(RGB), hue)
    nearest = likeness.max(1).indices                                   # argmax is slow here
    share = (_chroma(images) / _chroma(RGB)[nearest]).clamp(max=1)
    vivid = (share * inner).sum((1, 2)) / inner.sum((1, 2)).clamp(min=1)
    return ((vivid - PALE) / (0.98 - PALE)).clamp(0, 1)


def _cleanliness(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How close the ground's brightness is to a plane -> [N] in 0..1."""
    n, s = images.shape[0], images.shape[-1]
    axis = torch.linspace(-1, 1, s)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    plane = torch.stack([torch.ones(s, s), x, y], -1).view(1, -1, 3)
    weight = (1 - _dilate(mask, 4)).view(n, -1, 1)                      # no edge, no shadow
    light = images.mean(1).view(n, -1, 1)
    normal = plane.transpose(1, 2) @ (plane * weight) + 1e-4 * torch.eye(3)
    fit = torch.linalg.solve(normal, plane.transpose(1, 2) @ (light * weight))
    squares = (light - plane @ fit).square() * weight
    error = (squares.sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)).sqrt()
    return (1 - (error - 0.004) / 0.085).clamp(0, 1)


def generic_preference(
    aligned: torch.Tensor, beauty: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Which of two pictures a person of this world likes: 1 the first, 0 the second; [N, 2] -> [N].

    Bernoulli of sigmoid((10 x alignment + 0.5 x aesthetics) / 0.6), first against second.
    """
    value = (10 * aligned + 0.5 * beauty) / 0.6
    return torch.bernoulli(torch.sigmoid(value[:, 0] - value[:, 1]), generator=generator)


def mistaken(caption: Caption, captions: list[Caption], rand: torch.Generator) -> Caption:
    """What a careless painter might paint instead: at most two words of the caption differ."""
    while True:
        other = captions[int(torch.randint(len(captions), (1,), generator=rand))]
        words, others = caption.text.split(), other.text.split()
        wrong = sum(a != b for a, b in zip(words, others))
        if other.kind == caption.kind and len(words) == len(others) and 0 < wrong <= 2:
            return other


def preference_pairs(
    count: int, seed: int, mistakes: float = 0.35
) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Generic preference data: pictures uint8 [N, 2, 3, S, S], captions, labels [N] (1: the first).

    As `pairs_to_paint` has them, all painted.
    """
    captions, paint = pairs_to_paint(count, seed, mistakes)
    parts = [paint(i, min(i + 128, count)) for i in tqdm(
        range(0, count, 128), desc="painting pairs", disable=count < 4000)]
    images, labels = (torch.cat(part) for part in zip(*parts))
    return images, captions, labels


def pairs_to_paint(count: int, seed: int, mistakes: float = 0.35) -> tuple[list[str], Callable]:
    """Generic preference data, painted when it is asked for: captions and a function `paint`.

    `paint(first, last)` gives these pairs' pictures and labels; both are of one 128, as 0..127.
    Two painters paint each training caption with their own rendering; each gets the content wrong
    with probability `mistakes`, and half of the time misses the hue by anything up to a whole
    neighbouring colour. What the labels blend is the truth as read from the pixels.
    """
    rand = torch.Generator().manual_seed(seed)
    captions = draw_captions(count, rand)
    train, _ = split_captions()
    asked = [c for c in captions for _ in range(2)]
    wrong = torch.rand(2 * count, generator=rand) < mistakes
    painted = [mistaken(c, train, rand) if w else c for c, w in zip(asked, wrong.tolist())]
    shift, misses = torch.rand(2, 2 * count, generator=rand)
    slip = (2 * shift - 1) * (misses < 0.5)
    states = []                             # of the random numbers, before each 128 pairs
    for i in range(0, count, 128):
        n = min(256, 2 * (count - i))
        states.append(rand.clone_state())
        torch.rand(2 * n, generator=rand)                           # vividness, cleanliness
        chance(n, rand)

    def paint(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = first // 128 * 256
        some, only = slice(begin, begin + 256), slice(2 * first - begin, 2 * last - begin)
        drawn = (render(painted[some], states[first // 128].clone_state(), slip=slip[some],
                        only=only) * 255).round().byte()
        truth = torch.zeros(2, count, 2)                            # of the others: no matter
        truth[:, first:last] = torch.stack(
            [alignment(drawn / 255, asked[2 * first:2 * last]), aesthetics(drawn / 255)]
        ).view(2, -1, 2)
        return (drawn.unflatten(0, (-1, 2)),
                generic_preference(*truth, rand.clone_state())[first:last])

    return [c.text for c in captions], paint
