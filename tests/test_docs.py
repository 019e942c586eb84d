"""README and the pages in docs/ as their readers use them: every block of code is run, loaded or parsed."""

import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
import yaml
from datasets import Dataset
from evaluators import save_clip
from PIL import Image
from test_examples import ROOT, run

from mars_hf.cli import app
from mars_hf.data import emoji
from mars_hf.hub import HUB_FILES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KINDS = {"python", "bash", "yaml", "text", "bibtex"}  # text is shown, and no command
BREAKS = ("&&", "||", "|", ";", "&")
SYSTEM_COMMANDS = {"apt-get", "git", "cd", "hf"}
SOURCES = ("src", "examples", "benchmarks", "docs", "tests")


def blocks(page: Path, kind: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == kind]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


# What commands are, without running them


def commands(script: str) -> list[list[str]]:
    """Cut a shell script into its commands, comments and variables left out."""
    found: list[list[str]] = []
    for line in script.replace("\\\n", " ").splitlines():
        line = re.sub(r" > \S+", "", line)  # the file that is written to
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in BREAKS:
                words.append(word)
                continue
            while words and re.match(r"\w+=", words[0]):
                del words[0]
            found += [words] if words else []
            words = []
    return found


def check_command(words: list[str]) -> None:
    """Refuse a command whose program, script, option or target is not there."""
    program, rest = words[0], words[1:]
    scripts = [word for word in rest if word.endswith((".py", ".slurm", ".yaml")) and (ROOT / word).exists()]
    if program == "mars-hf":
        parse(rest)
    elif "mars_hf.cli" in rest:
        parse(rest[rest.index("mars_hf.cli") + 1 :])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"{rest} are no targets of the Makefile"
    elif program == "python" and "-c" in rest:
        compile(rest[rest.index("-c") + 1], "<command>", "exec")
    elif program in ("python", "accelerate", "sbatch"):
        assert scripts, f"{words} name no script of the repository"
        script = scripts[-1]
        options = [word for word in rest[rest.index(script) + 1 :] if word.startswith("--")]
        source = (ROOT / script).read_text()
        for option in options:
            assert f'"{option}"' in source, f"{script} has no option {option}"
    elif program == "pip":
        extras = ",".join(re.findall(r"(?:mars_hf|\.)\[([\w,]+)\]", " ".join(rest)))
        known = (ROOT / "setup.cfg").read_text()
        assert all(f"\n{extra} =\n" in known for extra in extras.split(",") if extra), f"unknown extra in {words}"
    else:
        assert program in SYSTEM_COMMANDS, f"{program} is no command that this test can check"


def parse(words: list[str]) -> None:
    """Parse a call of `mars-hf` as the command line does, and do nothing."""
    command, context, name = typer.main.get_command(app), None, "mars-hf"
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, words, parent=context)
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, [*words], parent=context)


def check_mention(words: list[str]) -> None:
    """Check a command in running text, which may leave arguments out."""
    if words[0] != "mars-hf":
        check_command(words)
        return
    command, rest = typer.main.get_command(app), words[1:]
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{words} is no command"
        command, rest = command.commands[rest[0]], rest[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known, f"{words} has an unknown option"


@BY_NAME
def test_every_block_is_of_a_kind_that_is_tested(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(BLOCK.findall(text))
    assert {kind for kind, _ in BLOCK.findall(text)} <= KINDS


@BY_NAME
def test_commands_have_the_options_that_are_shown(page):
    for script in blocks(page, "bash"):
        for command in commands(script):
            check_command(command)


@BY_NAME
def test_commands_in_the_text_exist(page):
    for span in re.findall(r"`([^`]+)`", prose(page)):
        if span.startswith(("mars-hf ", "python ", "make ")):
            check_mention(shlex.split(span))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mars-hf draw a --out a.png", "No such command"),
        ("mars-hf generate a --output a.png", "(?i)no such option"),
        ("mars-hf generate a", "(?i)missing parameter"),
        ("mars-hf data encode --data a --out b --size 64", "requires 2 arguments"),
        ("cd x && mars-hf train a --out b --fast", "(?i)no such option"),
        ("python examples/train.py a --outt b", "has no option --outt"),
        ("python examples/no_such_file.py", "name no script"),
        ("accelerate launch -m mars_hf.cli evaluate emoji --sett a=b", "(?i)no such option"),
        ("make everything", "no targets"),
        ("pip install 'mars_hf[everything]'", "unknown extra"),
        ("pip install -e '.[everything]'", "unknown extra"),
        ("mars_hf generate a", "no command that this test can check"),
    ],
)
def test_a_wrong_command_is_found(line, message):
    with pytest.raises(Exception, match=message):  # the command line has exceptions of its own
        for command in commands(line):
            check_command(command)


@pytest.mark.parametrize("line", ["mars-hf data draw", "mars-hf data encode --small-factor 2", "make everything"])
def test_a_wrong_mention_is_found(line):
    with pytest.raises(AssertionError):
        check_mention(line.split())


def files_of(page: Path) -> dict[str, str]:
    """Give the YAML files that a page shows; the first line of a block is a comment with its name."""
    found = {}
    for body in blocks(page, "yaml"):
        name = re.match(r"# ([\w.-]+\.yaml)\n", body)
        assert name, f"the first line of a YAML block in {page.name} must be its name, as in `# mine.yaml`"
        found[name[1]] = body
    return found


@BY_NAME
def test_yaml_files_are_accepted_by_what_reads_them(page, tmp_path):
    from mars_hf.data.build.recipe import load_recipe
    from mars_hf.evaluation.config import load_config
    from mars_hf.training.recipe import Recipe

    for name, body in files_of(page).items():
        (tmp_path / name).write_text(body, encoding="utf-8")
        readers = {"stage": Recipe.load, "metrics": load_config, "sources": lambda path: load_recipe(path, tmp_path)}
        (reader,) = [readers[key] for key in yaml.safe_load(body) if key in readers]
        reader(str(tmp_path / name))


# Links, names, size


@BY_NAME
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name} links {target}"


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\(docs/([\w.-]+\.md)\)", PAGES[0].read_text(encoding="utf-8"))
    assert sorted(set(linked)) == [page.name for page in PAGES[1:]]


def test_the_readme_is_short_and_begins_with_a_picture():
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) < 250
    picture = next(number for number, line in enumerate(lines) if line.startswith("!["))
    heading = next(number for number, line in enumerate(lines) if line.startswith("## "))
    assert picture < heading


def test_the_file_tree_of_the_readme_names_what_is_there():
    (tree,) = blocks(PAGES[0], "text")
    files = [*HUB_FILES, *(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))]
    assert not [file for file in files if not re.search(rf"(?<!\S){re.escape(file)}(?!\S)", tree)]


@pytest.mark.parametrize("drawing", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.stem)
def test_drawings_stand_alone_and_know_dark_pages(drawing):
    source = drawing.read_text(encoding="utf-8")
    ElementTree.fromstring(source)
    assert "prefers-color-scheme: dark" in source and "<title" in source
    assert not re.search(r"href=|url\((?!#)|<script", source)


def test_no_line_is_said_on_two_pages():
    seen: dict[str, str] = {}
    for page in PAGES:
        for line in {line for line in prose(page).splitlines() if len(line) > 60}:
            assert line not in seen, f"{page.name} and {seen[line]}: {line}"
            seen[line] = page.name


@cache
def known_words() -> frozenset[str]:
    """Words of the sources, and of the names of their files."""
    folders = [path for name in SOURCES for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".yaml")]
    files = [path for path in folders if path != Path(__file__)] + [ROOT / "setup.cfg", ROOT / "Makefile"]
    text = "\n".join([path.read_text(encoding="utf-8") for path in files] + [path.name for path in files])
    return frozenset(re.findall(r"\w+", text))


@BY_NAME
def test_names_in_the_text_are_names_in_the_code(page):
    """Names in backticks: a renamed class, argument, option or key is found in the pages that still have it."""
    for span in re.findall(r"`([^`]+)`", prose(page)):
        name = span.removeprefix("--").replace("-", "_") if span.startswith("--") else span
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", name):
            unknown = [part for part in re.findall(r"\w+", name) if part not in known_words() and len(part) > 2]
            assert not unknown, f"{page.name}: `{span}`"


# What runs


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with what the pages begin from: the exported checkpoint, small data like the emoji data, a CLIP."""
    folder = tmp_path_factory.mktemp("workshop")
    words = {"red": "红", "green": "绿", "blue": "蓝"}
    things = {"apple": "苹果", "kite": "风筝", "boat": "船", "hat": "帽子", "lamp": "灯", "drum": "鼓"}
    names = [(f"{en} {thing}", zh + ding) for en, zh in words.items() for thing, ding in things.items()]
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in emoji.SPLITS}
    for number, (english, chinese) in enumerate(names):
        hexcode, colour = f"{0x1F400 + number:X}", english.split()[0]
        for style in emoji.STYLES:
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><circle r="6" fill="{colour}"/></svg>'
            row = {"svg": svg, "caption_en": english, "caption_zh": chinese, "style": style}
            rows[emoji.split_of(hexcode, style)].append({**row, "hexcode": hexcode})
    data = folder / "data" / "emoji-64"
    (data / "data").mkdir(parents=True)
    for split, own in rows.items():
        emoji._write_shard(data / "data" / f"{split}-00000-of-00001.parquet", own, 64)
    emoji.write_card(data, 64, {split: len(own) for split, own in rows.items()})
    mars = (sys.executable, "-m", "mars_hf.cli")
    run(*mars, "export", "mars-emoji", cwd=folder)
    encode = ("data", "encode", "--data", "data/emoji-64", "--size", "64", "64")
    run(*mars, *encode, "--out", "data/emoji-64-codes", cwd=folder)
    (folder / "pictures").mkdir()
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (80, 70), colour).save(folder / "pictures" / f"{number}.png")
    captions = [{"file_name": f"{number}.png", "caption": f"picture {number}"} for number in range(4)]
    Dataset.from_list(captions).to_json(folder / "pictures" / "metadata.jsonl")
    save_clip(folder / "runs" / "judge" / "final")
    return folder


@pytest.mark.integration
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run_as_pasted(page, workshop, tmp_path):
    """One after the other in one process, in a folder with what the commands around them would have made."""
    for path in workshop.iterdir():
        if path.name == "mars-emoji":
            (tmp_path / path.name).symlink_to(path)
        else:
            shutil.copytree(path, tmp_path / path.name)
    for name, body in files_of(page).items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    run(sys.executable, "-c", "\n".join(blocks(page, "python")), cwd=tmp_path)
    if page.stem == "README":
        for number in range(2):
            with Image.open(tmp_path / f"picture-{number}.png") as picture:
                assert picture.size == (64, 64)
