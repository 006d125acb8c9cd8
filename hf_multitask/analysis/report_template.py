"""The HTML of a report: one template, filled with escaped text; styles for light and dark, for phones and paper."""

__all__ = ["TEMPLATE"]

# The policy lets the page load nothing and run nothing, whatever names and labels hold. Only pictures are put in as
# they are: they are drawn here, and their text is escaped where they are made.
TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ page.title }}</title>
<style>
:root { --ground: #ffffff; --text: #1b1f24; --soft: #5c6570; --line: #d5dae0; --stripe: #f5f7f9;
  --good: #1d7a3c; --bad: #b3263b; --warn: #8a5a00; --link: #2360b5; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181d; --text: #e4e8ec; --soft: #9aa4af; --line: #353c45; --stripe: #1c2026;
    --good: #4fb872; --bad: #ef7184; --warn: #d6a04a; --link: #7fb0f2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 1rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 48rem; overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .8rem 0; list-style: none;
  font-size: .9rem; }
.note { border-left: 5px solid var(--soft); background: var(--stripe); padding: .5rem .9rem; margin: .8rem 0; }
.note p { max-width: none; }
.good { border-color: var(--good); } .good strong { color: var(--good); }
.bad { border-color: var(--bad); } .bad strong { color: var(--bad); }
.warn { border-color: var(--warn); } .warn strong { color: var(--warn); }
.note ul { margin: .3rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; margin: 0 0 .8rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.caption { margin: 1rem 0 0; font-size: .9rem; color: var(--soft); }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
thead th { white-space: normal; }
th.words, td.words { text-align: left; white-space: normal; min-width: 5rem; max-width: 26rem;
  overflow-wrap: break-word; }
td.long { min-width: 13rem; }
th:first-child, td:first-child { padding-left: .2rem; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; }
tbody tr:nth-child(even) { background: var(--stripe); }
table.facts thead { display: none; }
table.facts { display: block; }
table.facts tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr));
  gap: .5rem 1.5rem; }
table.facts tr { background: none; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
table.facts th, table.facts td { display: block; padding: 0; border: 0; max-width: none; min-width: 0; }
table.facts th { font-size: .8rem; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1rem;
  margin: .8rem 0; align-items: start; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
figcaption small { display: block; font-weight: 400; font-size: .85rem; color: var(--soft); line-height: 1.35; }
figure svg { max-width: 100%; height: auto; display: block; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; }
pre { overflow-x: auto; background: var(--stripe); padding: .7rem; font-size: .85rem; line-height: 1.4; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .85rem; border-top: 1px solid var(--line); }
@media print {
  :root { --ground: #ffffff; --text: #000000; --soft: #444444; --line: #bbbbbb; --stripe: #ffffff;
    --good: #1d7a3c; --bad: #b3263b; --warn: #8a5a00; --link: #000000; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  figure, tr, .note { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
</style>
</head>
<body>
{%- macro table_of(table) %}
{%- if table.caption and not table.folded %}
<p class="caption">{{ table.caption }}</p>
{%- endif %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ table.caption or 'table' }}">
<table{% if table.facts %} class="facts"{% endif %}>
<thead><tr>
{%- for cell in table.head %}<th scope="col"{% if loop.index0 in table.left %} class="words"{% endif %}>{{ cell }}</th>
{%- endfor %}</tr></thead>
<tbody>
{%- for row in table.rows %}
<tr>
{%- for cell in row %}
{%- set kind = 'words long' if cell | length > 30 else 'words' %}
{%- set words = ' class="' ~ kind ~ '"' if loop.index0 in table.left else '' %}
{%- set tag = 'th scope="row"' if loop.first else 'td' %}
<{{ (tag ~ words) | safe }}>{{ cell }}</{{ tag[:2] }}>
{%- endfor %}</tr>
{%- endfor %}
</tbody>
</table>
</div>
{%- endmacro %}
<header>
<h1>{{ page.title }}</h1>
{%- for deploy, reason in page.verdicts %}
<div class="note {{ 'good' if deploy else 'bad' }}"><p><strong>{{ 'Deploy' if deploy else 'Do not deploy' }}</strong>
{{ reason }}</p></div>
{%- endfor %}
{%- if page.warnings %}
{%- set many = page.warnings | length %}
<div class="note warn"><strong>{{ many }} {{ 'warning' if many == 1 else 'warnings' }}</strong>
<ul>
{%- for warning in page.warnings %}
<li>{{ warning }}</li>
{%- endfor %}
</ul></div>
{%- endif %}
<nav aria-label="Parts of this page"><ul>
{%- for section in page.sections %}
<li><a href="#{{ section.anchor }}">{{ section.title }}</a></li>
{%- endfor %}
</ul></nav>
</header>
<main>
{%- for section in page.sections %}
<section id="{{ section.anchor }}">
<h2>{{ section.title }}</h2>
{%- for block in section.blocks %}
{%- set kind = kind_of(block) %}
{%- if kind == 'Table' and block.folded %}
<details><summary>{{ block.caption }}</summary>{{ table_of(block) }}</details>
{%- elif kind == 'Table' %}
{{- table_of(block) }}
{%- elif kind == 'Code' %}
<details><summary>{{ block.title }}</summary><pre tabindex="0">{{ block.text }}</pre></details>
{%- elif kind == 'list' %}
<div class="figures">
{%- for figure in block %}
<figure{% if figure.wide %} class="wide"{% endif %}>
{%- if figure.title or figure.note %}
<figcaption>{{ figure.title }}{% if figure.note %}<small>{{ figure.note }}</small>{% endif %}</figcaption>
{%- endif %}
{{ figure.svg | safe }}
</figure>
{%- endfor %}
</div>
{%- else %}
<p>{{ block }}</p>
{%- endif %}
{%- endfor %}
</section>
{%- endfor %}
</main>
<footer><p>{{ page.made_by }}.</p></footer>
</body>
</html>
"""
