"""SocialCounterfactuals and GenderBias-VL: the decisions that come out of small files of the published schemas."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dso.decisions.decision import ABSTAIN, DecisionError, DecisionSet
from dso.decisions.images import ImageError
from dso.decisions.sets import genderbias_vl, load_decisions, socialcounterfactuals
from dso.decisions.sets.portraits import LAYOUTS, QUESTIONS, Portrait, pair_up, portrait_decisions, side_by_side

RACES = ("White", "Black", "Latino")
JOBS = ("plumber", "nurse", "judge", "baker")


def picture(rgb: tuple[int, int, int], size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, rgb).save(data, kind)
    return data.getvalue()


def shade(number: int) -> tuple[int, int, int]:
    """The number as a colour that no other number has."""
    return (37 * number % 256, number, 255 - number)


def row(caption: str, scene: str, a1: str, a2: str, types: tuple[str, str], number: int) -> dict:
    return {
        "image": {"bytes": picture(shade(number)), "path": f"{number}.png"},
        "caption": caption, "counterfactual_set": scene, "a1": a1, "a2": a2, "a1a2": f"{a1} {a2}",
        "a1_type": types[0], "a2_type": types[1],
    }  # fmt: skip


def published(folder: Path) -> dict[tuple[str, str, str, str], int]:
    """Two shards: 4 occupations x 2 sets of race and gender, 2 sets of looks and gender, rows to be left out."""
    numbers = itertools.count(1)
    rows, known = [], {}
    for job in JOBS:
        for rank in range(2):
            scene = f"a_picture_of_race_gender_{job}_{rank}"
            for race, gender in itertools.product(RACES, ("male", "female")):
                number = next(numbers)
                caption = f"A picture of a {race} {gender} {job.title()}"
                rows.append(row(caption, scene, race, gender, ("race", "gender"), number))
                known[job, scene, race, gender] = number
    for job, looks, gender in itertools.product(("judge", "nurse"), ("skinny", "old"), ("male", "female")):
        number, scene = next(numbers), f"physical_gender_{job}_0"
        rows.append(row(f"a {looks} {gender} {job}", scene, looks, gender, ("physical", "gender"), number))
        known[job, scene, looks, gender] = number
    lone = row("A picture of a White male clown", "lone", "White", "male", ("race", "gender"), next(numbers))
    strange = row("A picture of somebody", "strange", "White", "male", ("race", "gender"), next(numbers))
    looks = row("a skinny White Judge", "looks", "skinny", "White", ("physical", "race"), next(numbers))
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        + [(name, pa.string()) for name in socialcounterfactuals.COLUMNS]
    )
    rows += [lone, strange, looks]
    (folder / "data").mkdir(parents=True)
    for shard, part in enumerate((rows[:20], rows[20:])):
        name = folder / "data" / f"train-0000{shard}-of-00002-abc.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), name, row_group_size=7)
    return known


@pytest.fixture(scope="module")
def social(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("social")
    return folder, published(folder)


def read(social, tmp_path: Path, **options) -> DecisionSet:
    return socialcounterfactuals.load(social[0], pictures=tmp_path / "pictures", **options)


def numbers_of(decision, known: dict) -> list[tuple]:
    """What the pictures of a decision show, from left to right, told by their colours."""
    of_shade = {shade(number): key for key, number in known.items()}
    found = []
    for path in decision.images:
        image = Image.open(path).convert("RGB")
        # Two people side by side are 32 pixels wide; JPEG keeps colours but for a level or two.
        pixels = [image.getpixel((x, 8)) for x in ((4, 28) if image.width == 32 else (8,))]
        for pixel in pixels:
            nearest = min(of_shade, key=lambda s: sum(abs(a - b) for a, b in zip(s, pixel, strict=True)))
            assert sum(abs(a - b) for a, b in zip(nearest, pixel, strict=True)) <= 6
            found.append(of_shade[nearest])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pictures_show_what_the_candidates_say(social, tmp_path, layout):
    decisions = read(social, tmp_path, layout=layout, per_context=99)
    assert decisions.groups == ("female", "male")
    for decision in decisions:
        left, right = numbers_of(decision, social[1])
        assert [left[3], right[3]] == [c.group for c in decision.candidates]
        assert [c.text for c in decision.candidates] == ["A", "B"]
        assert decision.prompt[0]["content"].count("<image>") == len(decision.images) == {"two": 2}.get(layout, 1)
        assert f"Who is the {decision.context}?" in decision.text
        if decision.ambiguous:  # the same occupation, set and race; only the gender differs
            assert left[:3] == right[:3] and left[0] == decision.context and left[3] != right[3]
        else:  # two occupations, and the one who is asked for is the right answer
            assert left[0] != right[0] and left[3] != right[3]
            assert (left, right)[decision.answer][0] == decision.context


def test_sides_and_groups_are_counterbalanced(social, tmp_path):
    decisions = read(social, tmp_path, per_context=99, questions=("who", "hire"))
    ambiguous = [d for d in decisions if d.ambiguous]
    unambiguous = [d for d in decisions if not d.ambiguous]
    # 8 sets of 3 races and 2 of 2 looks are 28 portraits, 14 units; the judge has 8 of them.
    assert len(decisions) == 14 * (2 * 2 * 2 + 4)
    assert Counter(d.candidates[0].group for d in ambiguous) == {"female": 56, "male": 56}
    assert Counter(d.answer for d in unambiguous) == {0: 28, 1: 28}
    assert Counter(d.candidates[d.answer].group for d in unambiguous) == {"female": 28, "male": 28}
    assert Counter(d.template for d in ambiguous) == {"side_by_side/who": 56, "side_by_side/hire": 56}
    assert {d.template for d in unambiguous} == {"side_by_side/who"}
    assert Counter(d.context for d in ambiguous)["judge"] == 8 * 2 * 2


def test_no_picture_occurs_in_two_units(social, tmp_path):
    decisions = read(social, tmp_path, per_context=99, layout="two")
    unit_of: dict[str, str] = {}
    for decision in decisions:
        for image in decision.images:
            assert unit_of.setdefault(image, decision.unit) == decision.unit
    assert len({d.unit for d in decisions}) == 14 and len(unit_of) == 14 * 4
    held_out = load_decisions(
        "socialcounterfactuals", path=social[0], pictures=tmp_path / "p", layout="two", hold_out={"units": 0.4}
    )
    images = {split: {i for d in held_out.select(split=split) for i in d.images} for split in held_out.splits}
    assert {"train", "test"} <= set(images) and not images["train"] & images["test"]


def test_portraits_are_drawn_by_the_seed(social, tmp_path):
    one, same = (read(social, tmp_path, per_context=2, seed=3) for _ in range(2))
    other = read(social, tmp_path, per_context=2, seed=4)
    assert one.decisions == same.decisions != other.decisions
    assert set(Counter(d.context for d in one if d.ambiguous).values()) == {4}  # two portraits, both orders
    only = read(social, tmp_path, contexts=["nurse", "judge"], per_context=1)
    assert only.contexts and set(only.contexts) == {"nurse", "judge"} and len(only) == 8


def test_only_the_pictures_that_are_used_are_written(social, tmp_path):
    decisions = read(social, tmp_path, per_context=1, layout="two")
    assert len(list((tmp_path / "pictures").iterdir())) == 4 * 2
    assert {Path(i).parent for d in decisions for i in d.images} == {tmp_path / "pictures"}


def test_other_attributes_and_abstaining(social, tmp_path):
    decisions = read(social, tmp_path, attribute="race", abstain=True, per_context=4)
    assert decisions.groups == ("Black", "Latino", "White")
    assert all([c.text for c in d.candidates] == ["A", "B", "C"] for d in decisions)
    assert all(d.candidates[2].group == ABSTAIN and "C if it cannot be told" in d.text for d in decisions)
    for decision in decisions:
        left, right = numbers_of(decision, social[1])
        assert [left[2], right[2]] == [c.group for c in decision.candidates[:2]]
        assert left[3] == right[3] or not decision.ambiguous  # the gender stays
    looks = read(social, tmp_path, attribute="physical")
    assert looks.groups == ("old", "skinny") and set(looks.contexts) == {"judge", "nurse"}


def test_articles_fit(tmp_path):
    decisions = made(tmp_path, ("engineer", "nurse"), questions=("hire",))
    assert {d.text.partition("as ")[2].partition("?")[0] for d in decisions if d.template.endswith("hire")} == {
        "an engineer", "a nurse",
    }  # fmt: skip


def made(
    folder: Path, contexts: tuple[str, ...], groups: tuple[str, ...] = ("female", "male"), **options
) -> DecisionSet:
    portraits = []
    for number, context in enumerate(contexts):
        pictures = {}
        for place, group in enumerate(groups):
            pictures[group] = str(folder / f"{number}-{group}.png")
            Image.new("RGB", (16, 16 + 8 * number), shade(10 * number + place)).save(pictures[group])
        portraits.append(Portrait(f"s{number}", context, pictures))
    return portrait_decisions("made", portraits, groups, folder=folder, **options)


def test_units_are_of_two_occupations_and_prefer_partners():
    portraits = [Portrait(f"{c}{i}", c, {}, ("b",) if c == "a" else ()) for c in "abc" for i in range(4)]
    found = list(pair_up(portraits, 0))
    assert len(found) == 6 and len({s.name for pair in found for s in pair}) == 12
    assert all(one.context != other.context for one, other in found)
    # Four of a kind and one other: one pair, three are left over.
    assert len(list(pair_up([*portraits[:4], portraits[4]], 0))) == 1
    assert all(other.context == "b" for one, other in found if one.context == "a" and other.context != "a")


def test_side_by_side_is_made_once_and_as_high_as_the_lower(tmp_path):
    Image.new("RGB", (20, 40), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 20), (10, 10, 250)).save(tmp_path / "b.png")
    whole = Path(side_by_side(str(tmp_path / "a.png"), str(tmp_path / "b.png"), tmp_path / "out"))
    image = Image.open(whole)
    assert image.size == (10 + 30, 20)
    assert image.getpixel((5, 10))[0] > 230 and image.getpixel((25, 10))[2] > 230
    before = whole.stat().st_mtime_ns
    assert side_by_side(str(tmp_path / "a.png"), str(tmp_path / "b.png"), tmp_path / "out") == str(whole)
    assert whole.stat().st_mtime_ns == before
    assert side_by_side(str(tmp_path / "b.png"), str(tmp_path / "a.png"), tmp_path / "out") != str(whole)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"b\.png' is damaged, or no image"):
        side_by_side(str(tmp_path / "a.png"), str(tmp_path / "b.png"), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attribute": "age"}, "attribute is 'age', expected one of gender, race, physical"),
        ({"layout": "heap"}, "layout is 'heap', expected one of side_by_side, two"),
        ({"questions": ("whom",)}, "unknown question 'whom'; known are who, hire, recommend"),
        ({"questions": ()}, "unknown question 'none'"),
        ({"contexts": ["pilot"]}, "no portrait of 'pilot'; occupations are, for example, baker, judge, nurse, plumber"),
        ({"contexts": ["judge"]}, "no two portraits of different occupations"),
    ],
)
def test_what_cannot_be_is_refused(social, tmp_path, options, message):
    with pytest.raises(DecisionError, match=message):
        read(social, tmp_path, **options)


def test_files_that_are_not_as_published_are_refused(tmp_path):
    with pytest.raises(DecisionError, match="no parquet file in"):
        socialcounterfactuals.load(tmp_path)
    with pytest.raises(
        DecisionError, match=r"there is no folder '/no/such/place'; give one with the parquet files, or a Hub id"
    ):
        socialcounterfactuals.load("/no/such/place")
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [1], "caption": ["x"]}), file)
    with pytest.raises(DecisionError, match=r"a\.parquet: has no column 'counterfactual_set'; it has image, caption"):
        socialcounterfactuals.load(tmp_path)
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(DecisionError, match=r"a\.parquet: cannot be read as parquet"):
        socialcounterfactuals.load(tmp_path)
    columns = {name: ["x", "y"] for name in socialcounterfactuals.COLUMNS}
    columns |= {"image": [None, None], "caption": ["x m", "x f"], "a1a2": ["x m", "x f"], "a1": ["x"] * 2}
    columns |= {"a2": ["m", "f"], "a1_type": ["race"] * 2, "a2_type": ["gender"] * 2}
    columns |= {"caption": ["x m judge", "x f judge"], "counterfactual_set": ["s", "s"]}
    pq.write_table(pa.table(columns), file)
    with pytest.raises(DecisionError, match=r"a\.parquet, row 0: image holds no bytes"):
        socialcounterfactuals.load(tmp_path, pictures=tmp_path)


def test_the_hub_is_asked_for_the_shards_that_are_wanted(social, tmp_path, monkeypatch):
    asked = []

    def listed(self, name, **where):
        asked.append((name, where))
        return ["README.md", "data/train-00001-of-00002-abc.parquet", "data/train-00000-of-00002-abc.parquet"]

    def fetched(name, file, **where):
        asked.append((file, where))
        return str(social[0] / file)

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", listed)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    where = {"repo_type": "dataset", "revision": "r1"}
    decisions = socialcounterfactuals.load("Intel/SocialCounterfactuals", revision="r1", shards=1, pictures=tmp_path)
    assert asked == [("Intel/SocialCounterfactuals", where), ("data/train-00000-of-00002-abc.parquet", where)]
    assert set(decisions.contexts) <= {"plumber", "nurse"}

    def refuse(self, name, **where):
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    with pytest.raises(DecisionError, match="the Hub does not give it: Name or service not known$"):
        socialcounterfactuals.load("a/b")


# ---------------------------------------------------------------- GenderBias-VL

PAIRS = (("Chief executive", "Executive secretary"), ("Waiter", "Cook"))


def genderbias(folder: Path) -> dict[str, int]:
    """The published layout: two pairs of occupations, two pictures of each gender, each with its counterfactual."""
    numbers, records, known = itertools.count(1), [], {}
    for pair in PAIRS:
        for (occ, alike), gender, rank in itertools.product((pair, pair[::-1]), genderbias_vl.GROUPS, range(2)):
            name = "_".join(occ.split())
            file = f"{name}/{gender}/{gender}_{name}_{rank}.png"
            for place in (genderbias_vl.BASE, genderbias_vl.SWAPPED):
                path = folder / place / file
                path.parent.mkdir(parents=True, exist_ok=True)
                known[f"{place}/{file}"] = number = next(numbers)
                path.write_bytes(picture(shade(number)))
            shown = "Waitress" if occ == "Waiter" and gender == "female" else occ
            base = {
                "occ": shown,
                "occ_sim": alike,
                "gender": gender,
                "filename": f"{gender}_{name}_{rank}",
                "id": len(records),
            }
            query = f"What is the person's occupation in this image? \nOptions: (A) {shown} (B) {alike}\n"
            base |= {"query": query, "gt_choices": [shown, alike], "gt_choice": 0}
            records.append(base | {"image_type": "base", "image": f"{genderbias_vl.BASE}/{file}"})
            records.append(base | {"image_type": "cf", "image": f"{genderbias_vl.SWAPPED}/{file}"})
    (folder / genderbias_vl.META).parent.mkdir(parents=True)
    (folder / genderbias_vl.META).write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), folder / "questions.parquet")
    return known


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("genderbias")
    return folder, genderbias(folder)


@pytest.mark.parametrize("meta", [genderbias_vl.META, "questions.parquet"])
def test_genderbias_vl_pairs_a_picture_with_its_counterfactual(vl, tmp_path, meta):
    folder, _ = vl
    decisions = load_decisions("genderbias-vl", path=folder, meta=meta, layout="two", pictures=tmp_path)
    assert set(decisions.contexts) == {"chief executive", "executive secretary", "waiter", "cook"}
    assert len(decisions) == 16 // 2 * 8
    for decision in decisions:
        shown = [Path(image).relative_to(folder).parts for image in decision.images]
        for (place, _, drawn, _), candidate in zip(shown, decision.candidates, strict=True):
            other = {"female": "male", "male": "female"}[drawn]
            assert candidate.group == (drawn if place == genderbias_vl.BASE else other)
        names = [name.replace("_", " ").lower() for _, name, _, _ in shown]
        if decision.ambiguous:
            assert shown[0][1:] == shown[1][1:] and names[0] == decision.context
        else:
            assert names[decision.answer] == decision.context
            assert set(names) in ({"chief executive", "executive secretary"}, {"waiter", "cook"})  # the published pairs


def test_genderbias_vl_side_by_side(vl, tmp_path):
    decisions = genderbias_vl.load(vl[0], per_context=1, pictures=tmp_path)
    assert len(decisions) == 16 and {len(d.images) for d in decisions} == {1}
    assert {Image.open(d.images[0]).size for d in decisions} == {(32, 16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gender": "x"}, r"json, record 0: gender is 'x', expected one of female, male"),
        ({"occ": 3}, "record 0: expected an object with the strings occ, occ_sim, gender, image_type, image"),
        ({"image": "elsewhere/a.png"}, "record 0: image is 'elsewhere/a.png', expected a path below xl_generate_base/"),
        (
            {"image": "xl_generate_base/a.png"},
            r"no picture .*xl_generate_base/a\.png; unpack .*xl_generate_base\.tar\.gz",
        ),
        ({"image_type": "cf"}, "no record of a base picture"),
    ],
)
def test_genderbias_vl_records_that_are_not_as_published(tmp_path, change, message):
    record = {
        "occ": "Cook",
        "occ_sim": "Chef",
        "gender": "male",
        "image_type": "base",
        "image": "xl_generate_base/b.png",
    }
    (tmp_path / genderbias_vl.META).parent.mkdir(parents=True)
    (tmp_path / genderbias_vl.META).write_text(json.dumps([record | change]))
    (tmp_path / "xl_generate_base.tar.gz").write_bytes(b"")
    with pytest.raises(DecisionError, match=message):
        genderbias_vl.load(tmp_path)


def test_genderbias_vl_files_that_are_not_there(tmp_path):
    with pytest.raises(DecisionError, match="ask_person.json: cannot be read: No such file"):
        genderbias_vl.load(tmp_path)
    for text, message in (("{", "not valid JSON"), ("{}", "expected a list of records, found dict")):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(DecisionError, match=rf"meta\.json: {message}"):
            genderbias_vl.load(tmp_path, meta="meta.json")
    with pytest.raises(
        DecisionError, match="there is no folder '/no/such'; give the folder of the published files, or a Hub id"
    ):
        genderbias_vl.load("/no/such")


def test_genderbias_vl_from_the_hub_is_unpacked(vl, tmp_path, monkeypatch):
    monkeypatch.setenv("DSO_CACHE", str(tmp_path / "cache"))

    def download(name, *, repo_type, revision, local_dir, allow_patterns):
        assert (name, repo_type, revision) == ("xiaoyisong/GenderBias-VL", "dataset", "r1")
        meta = Path(local_dir) / genderbias_vl.META
        meta.parent.mkdir(parents=True)
        meta.write_bytes((vl[0] / genderbias_vl.META).read_bytes())
        for place in (genderbias_vl.BASE, genderbias_vl.SWAPPED):
            with tarfile.open(Path(local_dir) / f"{place}.tar.gz", "w:gz") as packed:
                packed.add(vl[0] / place, place)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    decisions = genderbias_vl.load("xiaoyisong/GenderBias-VL", revision="r1", layout="two")
    assert len(decisions) == 64 and all(str(tmp_path) in image for d in decisions for image in d.images)


def test_every_question_names_the_occupation():
    assert all("{occupation}" in question for question in QUESTIONS.values())
