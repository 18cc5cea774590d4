"""An audit as one page of HTML that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from trainer.data.audit.charts import Bar, bars
from trainer.data.audit.findings import CLASSES
from trainer.data.audit.summary import DUPLICATES, in_groups
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.data.record import Records

SHOWN = 20  # records of a class, groups of duplicates, rows of a chart's tail; all of them are in the JSON
SHOWN_OF_A_GROUP = 6
MOST_THUMBNAILS = 200
THUMBNAIL_PX = 88
WITH_THUMBNAILS = ("too_small", "extreme_aspect", "rotated", "transparent")
HEAD = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="generator" content="difftrain audit">\n'
STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #646b78; --line: #dfe3e9; --paper: #fff; --card: #f6f7f9;
  --bar: #4a7fc1; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #9aa3b2; --line: #353b46; --paper: #16191f;
  --card: #1f242c; --bar: #6f9fdc; --good: #5cc58f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem; } h3 small, .soft { color: var(--soft); font-weight: normal; }
p { margin: .35rem 0 .75rem; max-width: 46rem; } code { font-size: .92em; overflow-wrap: anywhere; }
.verdict { border-left: 5px solid var(--good); background: var(--card); padding: .8rem 1rem; font-size: 1.1rem;
  margin: 1rem 0; border-radius: 0 6px 6px 0; max-width: none; } .verdict.no { border-color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; max-width: 100%; margin: .5rem 0 1rem; }
th, td { text-align: left; padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .86rem; white-space: nowrap; } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; } tr.chosen td { font-weight: 600; }
tr.zero td { color: var(--soft); } td.pic { width: 100px; } a { color: var(--bar); }
.bars { width: 100%; max-width: 46rem; height: auto; display: block; margin: .5rem 0; } .bars text { fill: var(--ink);
  font-size: 12.5px; white-space: pre; } .bars .value { fill: var(--soft); } .bars rect { fill: var(--bar); }
.bars .loud { fill: var(--bad); } .groups { display: flex; flex-wrap: wrap;
  gap: .75rem; margin: .6rem 0; } .group { background: var(--card); border-radius: 6px; padding: .75rem; }
.group p { margin: 0 0 .5rem; font-size: .88rem; max-width: 15rem; } .figures { display: flex; flex-wrap: wrap;
  gap: .75rem; } td.key { min-width: 14rem; }
figure { margin: 0; width: 110px; font-size: .8rem; overflow-wrap: anywhere; line-height: 1.3; }
img { max-width: 88px; max-height: 88px; display: block; border: 1px solid var(--line); border-radius: 3px;
  background: #fff; margin-bottom: .25rem; } .bad { color: var(--bad); } .good { color: var(--good); }
"""

Row = Mapping[str, Any]


def html_page(found: Row, records: Records) -> str:
    """The page; a picture on it is read again from `records`."""
    thumbnails = _Thumbnails(records)
    verdict, data, timing = found["verdict"], found["data"], found["timing"]
    stop = "" if verdict["exit_code"] == 0 else " no"
    return "".join(
        [
            HEAD,
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Audit</title>\n',
            f"<style>{STYLE}</style>\n<body>\n<h1>Audit of {data['records']:,} records</h1>\n",
            f'<p class="soft">{escape(found["config"])}, source <code>{escape(data["kind"])}</code>, fingerprint '
            f"<code>{data['fingerprint'][:12]}</code>; read in {timing['read_seconds']:.1f} s</p>\n",
            f'<p class="verdict{stop}">{escape(verdict["sentence"])}</p>\n',
            _counts(found),
            _policies(found["policies"]),
            _epoch(found),
            _captions(found["captions"]),
            _duplicates(found["duplicates"], thumbnails),
            _findings(found, thumbnails),
            "</body>\n</html>\n",
        ]
    )


def _counts(found: Row) -> str:
    rows = []
    for name, count in found["counts"].items():
        title = f'<a href="#{name}">{_title(name)}</a>' if count else _title(name)
        rows.append((count, title, escape(CLASSES[name])))
    for name, what in DUPLICATES.items():
        groups = found["duplicates"][name]
        count = sum(len(group["records"]) - 1 for group in groups)
        title = f'<a href="#{name}">{_title(name)}</a>' if count else _title(name)
        rows.append((count, title, f"{what}{in_groups(groups)}"))
    if found["run"] is None:
        rows = [row for row in rows if row[1] != _title("changed")]
    body = [f'<tr{"" if n else " class=zero"}><td class="n">{n:,}<td>{title}<td>{text}' for n, title, text in rows]
    formats = ", ".join(f"{count:,} {name}" for name, count in found["data"]["formats"].items())
    formats = f'<p class="soft">{formats}.</p>' if formats else ""
    head = '<th class="n">records<th>what<th>that is'
    return f"<h2>What was found</h2>{_table(head, body)}{formats}{_run(found['run'])}\n"


def _run(run: Row | None) -> str:
    if run is None:
        return ""
    said = run["why"] or (f"{run['changed']:,} records changed" if run["differs"] else "no record changed")
    return f"<p>Compared with the run in <code>{escape(run['path'])}</code>: {escape(said)}.</p>"


def _policies(policies: Sequence[Row]) -> str:
    body = []
    for row in policies:
        names = f"<td>{row['on_bad']}<td>{row['on_missing_caption']}"
        if row["refused"] is None:
            numbers = "".join(
                f'<td class="n">{row[name]:,}' for name in ("trained", "held_out", "left_out", "without_caption")
            )
            end = f'<td class="good">starts{numbers}'
        else:
            end = f'<td class="bad">exit {row["exit_code"]}<td colspan="4">{escape(row["refused"])}'
        chosen = ' class="chosen"' if row["configured"] else ""
        body.append(f"<tr{chosen}>{names}{end}")
    head = (
        "<th>data.on_bad<th>data.on_missing_caption<th>a run"
        '<th class="n">trained<th class="n">held out<th class="n">left out<th class="n">without caption'
    )
    over = "; more cannot be read than <code>data.max_bad_fraction</code> allows" * any(
        row["exceeds_max_bad_fraction"] for row in policies
    )
    return f"<h2>What each policy would do</h2><p>The config's own is in bold{over}.</p>{_table(head, body)}\n"


def _epoch(found: Row) -> str:
    epoch, scales = found["epoch"], found["scales"]
    if epoch is None:
        return ""
    first = f"{epoch['trained']:,} records in batches of {epoch['global_batch_size']:,}: {epoch['batches']:,g} batches"
    told = [f"{first} in the first epoch" + (f", {epoch['hypothetical']}" if epoch["hypothetical"] else "")]
    if repeats := sum(row["repeats"] for row in epoch["buckets"]):
        told.append(f"{repeats:,} reads are ahead of the next epoch, to fill batches")
    if dropped := len(epoch["dropped"]):
        told.append(f"{dropped:,} records fill no whole batch and are not read in it")
    if epoch["empty_buckets"]:
        told.append(f"{epoch['empty_buckets']:,} buckets have no record")
    shown = epoch["buckets"]
    chart = [Bar(row["bucket"], row["records"], _of_a_bucket(row)) for row in shown]
    scale = [
        Bar(_scale(row["from"], row["to"]), row["pictures"], loud=row["from"] is not None and row["from"] >= 1)
        for row in scales
    ]
    return (
        f"<h2>Shapes and sizes</h2><p>{'; '.join(told)}.</p>{bars(chart, 'records of each crop size')}"
        "<h3>How much pictures are resized <small>to cover their crops; red is enlarged</small></h3>"
        f"{bars(scale, 'pictures by how much they are shrunk or enlarged')}\n"
    )


def _of_a_bucket(row: Row) -> str:
    parts = [f"{row['batches']:,g} batches"]
    parts += [f"{row[name]:,} {told}" for name, told in (("repeats", "ahead"), ("dropped", "dropped")) if row[name]]
    return "in " + ", ".join(parts)


def _scale(low: float | None, high: float | None) -> str:
    if low is None:
        return f"shrunk {1 / (high or 1):g} x or more"
    if high is None:
        return f"enlarged over {low:g} x"
    if high == 1:
        return f"shrunk up to {1 / low:g} x"
    return f"enlarged up to {high:g} x" if low >= 1 else f"shrunk {1 / high:.3g} to {1 / low:.3g} x"


def _captions(captions: Row) -> str:
    tokens = captions["tokens"]
    same = captions["written"] - captions["distinct"]
    told = f"{captions['written']:,} captions, {captions['distinct']:,} of them different"
    told += f"; {same:,} repeat another record's" if same else ""
    parts = [f"<h2>Captions</h2><p>{told}.</p>"]
    if tokens is None:
        parts.append(f"<p>{escape(captions['not_counted'])}.</p>")
    elif tokens["captions"]:
        cut = (
            f"{tokens['cut']:,} are cut and {tokens['lost']:,} tokens lost" if tokens["cut"] else "none of them is cut"
        )
        longest = tokens["longest"]
        parts.append(
            f"<p>As trained on, with templates, prefix and suffix, {tokens['captions']:,} texts; the text encoder "
            f"reads {tokens['room']} tokens of each: {cut}. The longest has {longest['tokens']:,}, of "
            f"<code>{escape(longest['key'])}</code>.</p>"
        )
        rows = [
            Bar(
                f"{row['from']} to {row['to']}" if row["to"] else f"{row['from']} and more: cut",
                row["captions"],
                loud=row["to"] is None,
            )
            for row in tokens["histogram"]
        ]
        parts.append(bars(rows, "captions by their number of tokens"))
    if captions["most_repeated"]:
        body = [
            f'<tr><td class="n">{row["records"]:,}<td>{escape(_short(row["caption"], 200))}'
            for row in captions["most_repeated"][:10]
        ]
        parts.append(f"<h3>Most frequent</h3>{_table('<th class=n>records<th>caption', body)}")
    return "".join(parts) + "\n"


def _duplicates(found: Row, thumbnails: _Thumbnails) -> str:
    parts = []
    for name, what in DUPLICATES.items():
        groups = found[name]
        if not groups:
            continue
        extra = sum(len(group["records"]) - 1 for group in groups)
        parts.append(f'<h3 id="{name}">{_title(name)} <small>{extra:,} {what}{in_groups(groups)}</small></h3>')
        if name == "near":
            rule = found["near_rule"]
            parts.append(
                f"<p>At most {rule['most_bits']} of 64 bits of a difference hash differ, and 8 x 8 cells of colour by "
                f"no more than {rule['most_rms']:g} of 255 levels. {found['too_plain_to_compare']:,} pictures are too "
                "plain to be compared in this way: only their bytes and pixels were.</p>"
            )
        parts.append(f'<div class="groups">{"".join(_group(group, thumbnails) for group in groups[:SHOWN])}</div>')
        parts.append(_more(len(groups) - SHOWN, "groups"))
    return f"<h2>Duplicates</h2>{''.join(parts)}\n" if parts else ""


def _group(group: Row, thumbnails: _Thumbnails) -> str:
    told = [f"{len(group['records']):,} records"]
    if "bits" in group:
        told.append(f"within {group['bits']} bits and {group['rms']:.1f} levels from the first")
    if group["also_held_out"]:
        told.append("one is trained on and one is held out")
    figures = [
        f"<figure>{thumbnails.of(record['index'])}<code>{escape(_short(record['key'], 60))}</code><br>"
        f'<span class="soft">{record["width"]} x {record["height"]}</span></figure>'
        for record in group["records"][:SHOWN_OF_A_GROUP]
    ]
    more = len(group["records"]) - SHOWN_OF_A_GROUP
    figures += [f'<p class="soft">and {more:,} more</p>'] * (more > 0)
    return f'<div class="group"><p>{"; ".join(told)}</p><div class="figures">{"".join(figures)}</div></div>'


def _findings(found: Row, thumbnails: _Thumbnails) -> str:
    parts = []
    for name, rows in found["findings"].items():
        if not rows:
            continue
        pictures = name in WITH_THUMBNAILS
        body = [
            (f'<tr><td class="pic">{thumbnails.of(row["index"])}' if pictures else "<tr>")
            + f"<td class=key><code>{escape(_short(row['key'], 120))}</code><td>{escape(_short(row['reason'], 400))}"
            for row in rows[:SHOWN]
        ]
        head = f"{'<th>' if pictures else ''}<th>record<th>why"
        parts.append(
            f'<h3 id="{name}">{_title(name)} <small>{len(rows):,}: {escape(CLASSES[name])}</small></h3>'
            f"{_table(head, body)}{_more(len(rows) - SHOWN, 'records')}"
        )
    return f"<h2>Record by record</h2>{''.join(parts)}\n" if parts else ""


def _more(count: int, what: str) -> str:
    return f'<p class="soft">and {count:,} more {what}, all in the JSON beside this page</p>' if count > 0 else ""


def _table(head: str, rows: Iterable[str]) -> str:
    return f'<div class="scroll"><table><tr>{head}{"".join(rows)}</table></div>'


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize().replace("Cmyk", "CMYK").replace("utf8", "UTF-8")


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


class _Thumbnails:
    """Small pictures as data: URIs, until there are enough on the page."""

    def __init__(self, records: Records):
        self.records, self.left = records, MOST_THUMBNAILS

    def of(self, index: int | None) -> str:
        """An `<img>` of a record, or nothing."""
        if index is None or not self.left:
            return ""
        self.left -= 1
        try:
            image = self.records.image(index)
            image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), reducing_gap=2.0)
            packed = io.BytesIO()
            image.save(packed, "JPEG", quality=75)
        except (UserError, OSError, ValueError):  # it is a report: a picture that went away meanwhile is not shown
            return ""
        return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}">'
