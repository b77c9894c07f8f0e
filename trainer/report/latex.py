"""A table as LaTeX with booktabs, every word escaped."""

from __future__ import annotations

import re

from trainer.report.query import View
from trainer.report.table_notes import remarks, warnings
from trainer.report.table_texts import heading_of, is_text, shown_columns, text_of

_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\char34{}", "`": "{`}",
    "±": r"$\pm$", "−": "$-$", "≈": r"$\approx$", "×": r"$\times$", "·": r"$\cdot$", "≤": r"$\leq$", "≥": r"$\geq$",
    "→": r"$\rightarrow$", "…": r"\ldots{}", "–": "--", "—": "---", "’": "'", "‘": "`", "“": "``", "”": "''",
    "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "δ": r"$\delta$", "ε": r"$\epsilon$", "λ": r"$\lambda$",
    "μ": r"$\mu$", "µ": r"$\mu$", "σ": r"$\sigma$", "τ": r"$\tau$",
}  # fmt: skip
# what LaTeX's first font encoding sets without a package
_LETTERS = "àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿßœčćłńřšśžź"
_PLAIN = set(_LETTERS + _LETTERS.upper())


def as_latex(view: View) -> str:
    r"""A table environment; the document says \usepackage{booktabs}."""
    table, columns = view.table, shown_columns(view)
    lines = [
        f"% Rendered by make table ablation={table.name}; needs \\usepackage{{booktabs}}.",
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{latex_text(table.title)}}}\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{''.join('l' if is_text(column) else 'r' for column in columns)}}}",
        r"\toprule",
        _line(latex_text(heading_of(view, column)) for column in columns),
        *_body(view, columns),
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\medskip",
        r"\begin{minipage}{\linewidth}",
        *(rf"\textbf{{Warning:}} {latex_text(line)}\par" for line in warnings(table)),
        *(rf"{latex_text(line)}\par" for line in remarks(table)),
        r"\end{minipage}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _body(view: View, columns: tuple[str, ...]) -> list[str]:
    lines = []
    for group, cells in view.table.groups.items():
        lines.append(r"\midrule")
        if len(view.table.groups) > 1:
            lines.append(
                rf"\multicolumn{{{len(columns)}}}{{l}}{{\textit{{{latex_text(group)}}}}} \\"
            )
        for one in cells:
            texts = {column: text_of(view, one, column) for column in columns}
            # in a number a minus is one, and no hyphen
            lines.append(
                _line(
                    latex_text(text if is_text(name) else text.replace("-", "−"))
                    for name, text in texts.items()
                )
            )
    return lines


def _line(texts) -> str:
    return " & ".join(texts) + r" \\"


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is, on one line; a letter that its usual fonts lack as its code: [U+2713]."""
    text = " ".join(text.split())
    shown = "".join(map(_letter, text))
    shown = re.sub(r"([-'])(?=\1)", r"\1{}", shown)  # two of them in a row are another sign
    return (
        f"{{{shown[0]}}}{shown[1:]}" if shown.startswith(("[", "*")) else shown
    )  # behind the \\ of a line: its arguments


def _letter(mark: str) -> str:
    if mark in _ESCAPES:
        return _ESCAPES[mark]
    return (
        mark
        if mark in _PLAIN or (mark.isascii() and mark.isprintable())
        else f"[U+{ord(mark):04X}]"
    )
