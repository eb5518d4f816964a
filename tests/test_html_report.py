"""The page of a compression: well formed, whole, and made of nothing but itself."""

import copy
import html.parser
import re

import pytest

from qmoe_jax.reports.html import html_report

VOID = {"meta"}
LAYER = {
    "zeros": 0.88,
    "entropy_per_weight": 0.61,
    "bits_per_weight": 0.7,
    "tokens_per_expert": [30, 0, 12],
    "fallback": {"1": "no calibration tokens"},
    "overloaded": {"0": 45},
    "output_error": 0.04,
    "output_error_per_expert": [0.03, None, 0.05],
    "starved": {"1": 0, "2": 12},
}
REPORT = {
    "loss": 1.25,
    "loss_paper": 1.26,
    "num_documents": 128,
    "num_tokens": 20_000,
    "method": "gptq",
    "title": "GPTQ",
    "bits": 1.5,
    "num_calibration_documents": 10_000,
    "zeros": 0.88,
    "entropy_per_weight": 0.61,
    "bytes_bfloat16": 3_142e9,
    "bytes_model": 158.6e9,
    "bits_per_weight": 0.7,
    "compression_experts": 20.07,
    "compression_model": 19.81,
    "experts_total": 6,
    "experts_quantized": 3,
    "experts_fallback": 3,
    "super_experts": [{"layer": "decoder/layers_11", "expert": 2, "peak": 1234.5, "times_median": 310.0}],
    "layers": {
        "encoder/layers_1": LAYER,
        "decoder/layers_11": LAYER | {"fallback": {"1": "no calibration tokens", "2": "the Hessian of wo is zero"}},
    },
    "seconds": {"reading": 10.0, "quantization": 40.0, "total": 60.0, "comparison": 5.0},
    "peak_rss_bytes": 3_000_000_000,
    "plan": {"peak_host_bytes": 4_000_000_000, "host_bytes": {"activations": 2_500_000_000}},
    "baselines": {"bfloat16": {"loss": 1.18, "loss_paper": 1.19}},
    "checkpoint": {"checkpoint": "gs://bucket/switch_c_2048/checkpoint_611800", "layout": "t5x", "step": 611_800},
    "config": {"codec": {"name": "gap"}, "data": {"validation": "c4.json.gz", "window": None}},
    "environment": {"jax": "0.10.2"},
}


class Page(html.parser.HTMLParser):
    """Elements are checked to close in order; keeps text, attributes, and the rows of tables by section."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes, self.tags = [], [], [], set()
        self.rows, self.section = {}, None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self.section = data
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[self.section][-1][-1] += data


@pytest.fixture(scope="module")
def page():
    return Page(html_report(REPORT))


def test_headline_and_comparison(page):
    text = " ".join(page.words)
    for number in ("1.2500", "+0.0700", "0.700", "20.07x", "19.81x", "88.0%", "3 of 6", "158,600.00 MB"):
        assert number in text, number
    assert "switch_c_2048/checkpoint_611800: GPTQ, 1.5 bits" in text
    _, bfloat16, own = page.rows["Loss and size"]
    assert bfloat16[:3] == ["bfloat16", "1.1800", "1.1900"] and own[:2] == ["GPTQ, 1.5 bits", "1.2500"]


def test_every_row_fits_its_header(page):
    for name, rows in page.rows.items():
        assert len({len(row) for row in rows}) == 1, name


def test_every_layer_and_every_expert_that_fell_back(page):
    _, *layers = page.rows["Layer by layer"]
    assert [row[0] for row in layers] == list(REPORT["layers"])
    assert layers[0][1:] == ["0.0400", "0.6100", "0.7000", "0.8800", "0", "12", "30", "1", "1"]
    _, *fallbacks = page.rows["Experts that fell back"]
    found = {(layer, e): why for layer, experts, why in fallbacks for e in experts.split(", ")}
    expected = {(name, e): why for name, layer in REPORT["layers"].items() for e, why in layer["fallback"].items()}
    assert found == expected and len(found) == 3


def test_experts_with_few_tokens_and_super_experts(page):
    assert [row[1] for row in page.rows["Experts with few tokens"][1:]] == ["1 (0), 2 (12)"] * 2
    assert page.rows["Super experts"][1] == ["decoder/layers_11", "2", "1234.5000", "310.0000"]


def test_time_memory_settings_and_origin(page):
    _, *seconds = page.rows["Time"]
    assert {row[0]: float(row[1]) for row in seconds} == REPORT["seconds"]
    _, peak, part = page.rows["Memory"]
    assert (peak[1:], part) == (["3 GB", "4 GB"], ["of that: activations", "", "2.5 GB"])
    assert ["codec.name", "gap"] in page.rows["Settings"] and ["data.window", "-"] in page.rows["Settings"]
    assert ["checkpoint.step", "611800"] in page.rows["Made from, and with"]
    assert ["environment.jax", "0.10.2"] in page.rows["Made from, and with"]


def test_the_page_needs_nothing_else_and_runs_nothing(page):
    assert not page.tags & {"script", "link", "iframe", "img", "object", "base", "foreignobject"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), value
    text = html_report(REPORT)
    assert not re.search(r"@import|url\((?!#)", text)
    addresses = set(re.findall(r"https?://[^\"'\s<>]+", text))
    assert all(a.startswith("http://www.w3.org/") for a in addresses)  # names of SVG's own language


def test_four_figures_in_the_colours_of_the_page(page):
    text = html_report(REPORT)
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) == 4 and all("currentColor" in f for f in figures)
    names = [set(re.findall(r'\bid="([^"]+)"', f)) for f in figures]
    used = [set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", f)) for f in figures]
    for own, wanted in zip(names, used, strict=True):
        assert wanted <= own
    assert html_report(copy.deepcopy(REPORT)) == text  # The same report gives the same page.


def test_foreign_text_is_escaped():
    nasty = "</td><script>alert('x')</script>&amp;\""
    report = copy.deepcopy(REPORT)
    report["checkpoint"]["checkpoint"] = f"bucket/{nasty}"
    report["config"]["data"][nasty] = nasty
    report["layers"]["encoder/layers_1"]["fallback"]["1"] = nasty
    report["environment"]["jax"] = nasty
    page = Page(html_report(report))
    assert "script" not in page.tags
    assert [f"data.{nasty}", nasty] in page.rows["Settings"]
    assert ["encoder/layers_1", "1", nasty] in page.rows["Experts that fell back"]


def test_what_was_measured_without_codec_baselines_or_fallbacks():
    report = copy.deepcopy(REPORT)
    del report["baselines"], report["config"], report["checkpoint"], report["plan"]
    for layer in report["layers"].values():
        layer |= {"fallback": {}, "bits_per_weight": None, "output_error": None, "output_error_per_expert": [None] * 3}
    report |= dict.fromkeys(("bits_per_weight", "bytes_model", "compression_experts", "compression_model"))
    page = Page(html_report(report))
    assert "Experts that fell back" not in page.rows
    assert page.rows["Layer by layer"][1][1:4] == ["-", "0.6100", "-"]


def test_thousands_of_experts_make_no_huge_page():
    report = copy.deepcopy(REPORT)
    layer = LAYER | {"tokens_per_expert": list(range(2_048)), "output_error_per_expert": [0.1] * 2_048}
    report["layers"] = {f"encoder/layers_{i}": layer for i in range(10)}
    text = html_report(report)
    assert len(text) < 2e6
    Page(text)
