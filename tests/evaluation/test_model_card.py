"""A rule's folder: the file and a page that says what the card says, whatever a stranger wrote into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from strangers import CONTROLS

import lopt
from lopt.evaluation.report.model_card import export_rule, write_page
from lopt.rules import RULES
from lopt.rules.files import fingerprint
from lopt.rules.learned_init import LearnedInit


def test_every_shipped_rule_has_a_page_with_what_its_card_says(tmp_path: Path) -> None:
    for name in lopt.list_rules():
        rule, card = lopt.load(name), lopt.load_card(name)
        file, page = export_rule(rule, card, tmp_path / name)
        text = page.read_text()
        assert fingerprint(lopt.load(file)) == fingerprint(rule)
        assert text.startswith("---\nlibrary_name: lopt\n")
        assert "license: apache-2.0\n---\n" in text
        assert f"\n# {card['name']}\n" in text
        assert f"runs of up to {card['longest_run']} steps" in text
        assert max(map(len, text.splitlines())) < 800
        for result in card.get("results", []):
            assert f"| {result['final']['rule']:g} | {result['final']['best_tuned_name']}" in text


def test_page_says_where_the_rule_loses() -> None:
    card = dict(lopt.load_card("digits-lstm"))
    lost = card["results"][0] | {"final": {"rule": 0.5, "best_tuned": 0.4, "best_tuned_name": "adam"}}
    broken = card["results"][1] | {"final": {"rule": None, "best_tuned": 0.4, "best_tuned_name": "sgd"}}
    text = write_page(lopt.load("digits-lstm"), card | {"results": [lost, broken]})
    assert "- On mlp: as trained, 100 steps its final loss is above that of adam.\n" in text
    assert "- On mlp: 200 steps its final loss is above that of sgd.\n" in text
    assert "| diverged | sgd 0.4 |" in text


def test_a_strangers_words_stay_in_their_cell() -> None:
    words = "<script>x</script> | [a](http://b) `c` **d**\n# e\n---\nlicense: mit"
    for text in (words, *CONTROLS):
        page = write_page(
            RULES["sgd"](), {"name": "<b>|", "description": text, "note": text, "licence": "x\nlicense: y"}
        )
        assert page.isprintable() or not set(page) & set("\x1b\x07\u202e\x9b")
        assert "<script>" not in page
        assert r"\[a\](http://b)" in page or "http" not in page
        assert page.count("\nlicense:") == 0
        assert [line for line in page.splitlines() if line.startswith("# ")] == ["# &lt;b&gt;\\|"]


def test_use_on_the_page_fits_the_rule() -> None:
    assert "num_steps=len(batches))\n...\noptimizer.step()" in write_page(lopt.load("lopt-base"), {})
    assert "...\noptimizer.step(loss=loss)" in write_page(RULES["idbd"](), {})
    assert 'parameters(), rule="rule.safetensors")\n...\noptimizer.step()' in write_page(RULES["sgd"](), {})
    assert 'lopt.adapt(model, "hf://me/x", (inputs' in write_page(LearnedInit({"w": [2, 3]}), {}, "hf://me/x")


def test_head_is_read_by_the_hubs_own_reader(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="rules on a hub: extra `hub`")
    _, page = export_rule(lopt.load("lopt-base"), {}, tmp_path, licence="MIT", address="hf://me/my-rule")
    card = hub.ModelCard.load(page)
    assert card.data.license == "mit"
    assert card.data.library_name == "lopt"
    assert "pytorch" in card.data.tags
    assert "# my-rule\n" in card.text
    assert lopt.load_card(tmp_path / "rule.safetensors") == {"name": "my-rule", "licence": "MIT"}


def test_what_is_there_is_only_overwritten_by_force(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    rule = RULES["sgd"]()
    with pytest.raises(FileExistsError, match=r"README\.md exists already.*--force"):
        export_rule(rule, {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    export_rule(rule, {}, tmp_path, force=True)
    assert "sgd" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="SPDX identifier, such as MIT"):
        export_rule(rule, {}, tmp_path, licence="my own: free", force=True)
