"""Charts as SVG, from plain numbers: a white ground of their own, so that dark pages show them too.

Widths are pixels. A spread is (mean, half of the 95 % interval, or None with fewer seeds).
"""
import html
import math

from report import COLOURS

INK, SOFT, GRID = "#1d1f23", "#5b5f66", "#dddad3"
WIDTH, LINE, ROW = 700, 17, 19      # of a picture; heights of a line of text and of an arm's row
HALO = 'font-size="12" paint-order="stroke" stroke="#fff" stroke-width="3"'


def text(x: float, y: float, words: str, anchor: str = "start", style: str = "") -> str:
    """Words at a place; `anchor`: start, middle or end."""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>'
            f'{html.escape(words)}</text>')


def path(points: list[tuple[float, float]], colour: str, style: str = "") -> str:
    """A line through points."""
    along = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{along}" fill="none" stroke="{colour}" {style}/>'


def dot(x: float, y: float, colour: str, radius: float = 4, hollow: bool = False) -> str:
    """A point; hollow ones are single seeds."""
    fill = "#fff" if hollow else colour
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{colour}"/>'


def page(title: str, height: float, parts: list[str], notes: list[str]) -> str:
    """A whole picture: title, what was drawn, and below `height` what a stranger must know."""
    below = [text(16, height + LINE * i, note, style=f'fill="{SOFT}" font-size="12"')
             for i, note in enumerate(notes)]
    whole = height + LINE * len(notes) + 2
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole:.0f}" '
        f'width="{WIDTH}" role="img" aria-label="{html.escape(title)}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{whole:.0f}" rx="8" fill="#fff"/>',
        text(16, 26, title, style='font-size="16" font-weight="600"'), *parts, *below, "</svg>\n",
    ])


def scale(low: float, high: float, start: float, end: float):
    """The function from a value in low..high to its place in start..end."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values in low..high, at most `most`: steps are 1, 2 or 5 times a power of ten."""
    if not most:
        return []
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(f * power for f in (1, 2, 5, 10) if (high - low) / (f * power) < most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]


def bounds(values: list[float], share: float = 0.06) -> tuple[float, float]:
    """Lowest and highest, with room beyond."""
    room = share * ((max(values) - min(values)) or 1.0)
    return min(values) - room, max(values) + room


def figure(value: float, form: str) -> str:
    """A tick's number; zero has no sign."""
    return "0" if abs(value) < 1e-9 else f"{value:{form}}"


def axes(x, y, xs: tuple[float, float], ys: tuple[float, float], names: tuple[str, str],
         form: tuple[str, str] = ("g", "g"), most: int = 6) -> list[str]:
    """Grid, figures and names of both axes; `x`, `y` are scales of the ranges `xs`, `ys`."""
    left, right, low, high = x(xs[0]), x(xs[1]), y(ys[0]), y(ys[1])
    small = f'fill="{SOFT}" font-size="12"'
    out = [path([(left, high), (left, low), (right, low)], SOFT)]
    for value in ticks(*xs):
        out += [path([(x(value), low), (x(value), high)], GRID),
                text(x(value), low + 16, figure(value, form[0]), "middle", small)]
    for value in ticks(*ys, most):
        out += [path([(left, y(value)), (right, y(value))], GRID),
                text(left - 6, y(value) + 4, figure(value, form[1]), "end", small)]
    return [*out, text((left + right) / 2, low + 34, names[0], "middle"),
            text(left, high - 9, names[1])]


def bar(x: float, low: float, high: float, colour: str, across: bool = False) -> list[str]:
    """A 95 % interval with its two caps; `across`: a horizontal one at height x."""
    lines = [[(x, low), (x, high)], *([(x - 4, end), (x + 4, end)] for end in (low, high))]
    if across:
        lines = [[(b, a) for a, b in line] for line in lines]
    return [path(line, colour, 'stroke-width="1.5" opacity="0.7"') for line in lines]


def apart(places: list[float], least: float) -> list[float]:
    """The same heights moved down so far that neighbours keep `least` between them."""
    out, last = list(places), -math.inf
    for i in sorted(range(len(places)), key=places.__getitem__):
        last = out[i] = max(places[i], last + least)
    return out


def draw_curves(title: str, series: dict[str, list[tuple]], names: tuple[str, str],
                notes: list[str]) -> str:
    """{name: [(x, mean, half or None)]} -> lines with intervals, named at their ends."""
    every = [point for line in series.values() for point in line]
    xs = (0.0, 1.02 * max(x for x, _, _ in every))
    ys = bounds([m + sign * (half or 0) for _, m, half in every for sign in (-1, 1)])
    x, y = scale(*xs, 60, WIDTH - 120), scale(*ys, 370, 66)
    out = axes(x, y, xs, ys, names, (",.0f", "+.1f"))
    ends = apart([y(line[-1][1]) + 4 for line in series.values()], LINE)
    for (name, line), end, colour in zip(series.items(), ends, COLOURS):
        for at, mean, half in line:
            if half:
                out += bar(x(at), y(mean - half), y(mean + half), colour)
        out += [path([(x(at), y(mean)) for at, mean, _ in line], colour, 'stroke-width="2.5"'),
                *(dot(x(at), y(mean), colour) for at, mean, _ in line),
                path([(x(line[-1][0]) + 6, y(line[-1][1])), (WIDTH - 112, end - 4)], colour),
                text(WIDTH - 108, end, name)]
    return page(title, 430, out, notes)


def draw_arms(title: str, groups: dict[str, list[tuple]], reference: float, name: str,
              notes: list[str]) -> str:
    """{group: [(arm, gains of its seeds, half or None)]} -> a row for every arm.

    `reference`: the gain that a dashed line shows.
    """
    rows = [row for group in groups.values() for row in group]
    ends = [end for _, values, half in rows for end in values]
    ends += [sum(v) / len(v) + sign * half for _, v, half in rows if half for sign in (-1, 1)]
    xs = bounds([0.0, *ends], 0.03)
    bottom = 58 + sum(ROW * (len(group) + 1) + 8 for group in groups.values())
    x, ys = scale(*xs, 190, WIDTH - 24), (0.0, 1.0)
    out = axes(x, scale(*ys, bottom, 44), xs, ys, (name, ""), ("+.1f", "g"), 0)
    out.append(path([(x(reference), 44), (x(reference), bottom)], SOFT, 'stroke-dasharray="5 4"'))
    height = 44.0
    for group, colour in zip(groups, COLOURS * 2):
        height += ROW + 6
        out.append(text(16, height, group, style=f'{HALO} font-weight="600"'))
        for arm, values, half in groups[group]:
            height += ROW
            out.append(text(180, height, arm, "end"))
            mean = sum(values) / len(values) if values else 0.0
            if not values:
                out.append(text(x(0) + 6, height, "not measured", style=f'fill="{SOFT}"'))
            if half:
                out += bar(height - 4, x(mean - half), x(mean + half), colour, across=True)
                out.append(dot(x(mean), height - 4, colour, 5))
            out += [dot(x(value), height - 4, colour, 3, hollow=True) for value in values]
        height += 2
    return page(title, bottom + 58, out, notes)


def draw_plane(title: str, groups: dict[str, list[tuple]], names: tuple[str, str],
               notes: list[str], first: str) -> str:
    """{group: [(arm, x, y)]} -> points; arms are named where there is room.

    The arm `first` comes first, then the outliers.
    """
    every = [(arm, at, up) for group in groups.values() for arm, at, up in group]
    xs, ys = bounds([0.0, *(p[1] for p in every)]), bounds([0.0, *(p[2] for p in every)])
    x, y = scale(*xs, 60, WIDTH - 24), scale(*ys, 400, 66)
    out = axes(x, y, xs, ys, names, ("+.1f", "+.1f"))
    out.append(path([(x(xs[0]), y(0)), (x(xs[1]), y(0))], SOFT, 'stroke-dasharray="5 4"'))
    middle = [sorted(p[i] for p in every)[len(every) // 2] for i in (1, 2)]
    taken = [(x(at) - 5, y(up) - 5, x(at) + 5, y(up) + 5) for _, at, up in every]

    def far(point: tuple) -> tuple[bool, float]:
        distance = math.hypot(x(point[1]) - x(middle[0]), y(point[2]) - y(middle[1]))
        return point[0] == first, distance

    for arm, at, up in sorted(every, key=far, reverse=True):
        wide = 6.6 * len(arm)
        for left, base in ((x(at) + 8, y(up) + 4), (x(at) - 8 - wide, y(up) + 4),
                           (x(at) - wide / 2, y(up) + 19), (x(at) - wide / 2, y(up) - 9)):
            box = (left, base - 10, left + wide, base + 2)
            free = not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3]
                           for b in taken)
            if free and x(xs[0]) < left and left + wide < WIDTH - 4:
                taken.append(box)
                out.append(text(left, base, arm, style=HALO))
                break
    height, place = 462.0, 60.0
    for group, colour in zip(groups, [*COLOURS, INK, "#ee8866"]):
        out += [dot(x(at), y(up), colour, 5) for _, at, up in groups[group]]
        if place + 7 * len(group) + 20 > WIDTH:
            height, place = height + LINE, 60.0
        out += [dot(place, height - 4, colour), text(place + 9, height, group)]
        place += 7 * len(group) + 28
    return page(title, height + 26, out, notes)


def draw_panels(title: str, panels: list[tuple], marks: dict[str, float], notes: list[str]) -> str:
    """[(name, {seed: [(x, y)]}, {seed: x of its alarm})] -> charts two abreast over rounds.

    `marks`: for each seed the x of a dashed line.
    """
    wide, tall, out = (WIDTH - 30) / 2, 170, []
    colours = dict(zip(panels[0][1], COLOURS))
    for i, (name, lines, alarms) in enumerate(panels):
        left, top = 62 + (i % 2) * wide, 82 + (i // 2) * tall
        every = [point for line in lines.values() for point in line]
        xs, ys = (0.0, max(p[0] for p in every)), bounds([p[1] for p in every])
        x, y = scale(*xs, left, left + wide - 70), scale(*ys, top + 96, top)
        out += axes(x, y, xs, ys, ("round", name), most=4)
        for seed, line in lines.items():
            out.append(path([(x(a), y(b)) for a, b in line], colours[seed], 'stroke-width="2"'))
            if marks.get(seed):
                ends = [(x(marks[seed]), top), (x(marks[seed]), top + 96)]
                out.append(path(ends, colours[seed], 'stroke-dasharray="5 4"'))
        for seed, at in alarms.items():
            out += [dot(x(at), y(b), colours[seed], 5) for a, b in lines[seed] if a == at]
    for i, (seed, colour) in enumerate(colours.items()):
        out += [dot(66 + 80 * i, 44, colour), text(76 + 80 * i, 48, f"seed {seed}")]
    rows = (len(panels) + 1) // 2
    return page(title, 82 + rows * tall, out, notes)
