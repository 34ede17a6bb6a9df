"""A prompt as the text that a model reads: chat messages through the model's chat template, images as its slots.

A decision's prompt marks each image's place with ``<image>``. A vision-language model has its own spelling of that slot
(``<|vision_start|><|image_pad|><|vision_end|>``, ``<start_of_image>``, ...), which its chat template writes for an item
``{"type": "image"}``. Templates differ in what they take: some want every message as a list of items, some a system
message as a string, some write all images before the words, wherever they stood. So the rendered text is checked: every
word and every image in the order of the prompt. The first form of the messages that passes is used; the last ones write
the slots into the words themselves. A text model's template is asked first what it does with each role, and a message
that it drops is refused. Today's date, which some templates print, is the scoring's
(:class:`dso.models.scores.Scoring`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from dso.decisions.decision import IMAGE_SLOT, Message
from dso.errors import UserError, first_line

Prompt = str | Sequence[Message]
TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_LIST = re.compile(r"""["']type["']: *["'](text|image)["']""")
NO_TEMPLATE = "the prompt is a chat, but the {part} of {name!r} has no chat template; give the prompt as a string"


def template_digest(template: str | None) -> str:
    """What tells a chat template from others; "" where there is none."""
    return hashlib.sha256(template.encode()).hexdigest()[:16] if template else ""


def chat_template(owner: Any) -> str | None:
    """The chat template of a tokenizer or processor; of several by name the default one."""
    template = getattr(owner, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def render_text(prompt: Prompt, tokenizer: Any, name: str, date: str) -> tuple[str, bool]:
    """The prompt's text for a language model, and whether the tokenizer has to add its special tokens.

    Args:
        date: what the template takes for today, as YYYY-MM-DD.

    Raises:
        UserError: if chat messages meet a tokenizer without a chat template, or one that refuses them, drops one, or
            changes the words of one.
    """
    if isinstance(prompt, str):
        return prompt, True
    template = chat_template(tokenizer)
    if not template:
        raise UserError(NO_TEMPLATE.format(part="tokenizer", name=name))
    # Words that stand in no prompt, as a message's own may also stand in another one.
    marked = [message | {"content": f"dso{number}message"} for number, message in enumerate(prompt)]
    kept = _apply(tokenizer, template, marked, name, date)
    text = _continued(_apply(tokenizer, template, prompt, name, date), prompt, name)
    for message, mark in zip(prompt, marked, strict=True):
        if mark["content"] not in kept or message["content"].strip() not in text:
            raise UserError(
                f"the chat template of {name!r} drops or changes the {message['role']} message "
                f"{message['content'][:40]!r}; put its words into the user's message"
            )
    return text, False  # the template writes the special tokens itself


def _continued(text: str, prompt: Sequence[Message], name: str) -> str:
    """A rendered prompt with the blanks that a template took off the end of the answer that is to be continued.

    Raises:
        UserError: if the text does not end in that answer.
    """
    last = prompt[-1]["content"]
    if prompt[-1]["role"] != "assistant" or text.endswith(last):
        return text
    kept = last.rstrip()
    if not text.endswith(kept):
        raise UserError(
            f"the chat template of {name!r} turns the answer to be continued, {last[-40:]!r} into {text[-40:]!r}"
        )
    return text + last[len(kept) :]


def render_images(
    prompt: Prompt, tokenizer: Any, template: str | None, token: str, slot: str, name: str, date: str
) -> tuple[str, bool]:
    """The same for a vision-language model, whose template may leave the special tokens to the tokenizer.

    Args:
        template: the processor's chat template.
        token: what the processor takes for an image, once for each.
        slot: the token with what stands around it in this model's prompts.
        date: what the template takes for today.

    Raises:
        UserError: as :func:`render_text`, or if no form of the messages keeps every word and image in its place.
    """
    if isinstance(prompt, str):
        return prompt.replace(IMAGE_SLOT, slot), True
    if not template:
        raise UserError(NO_TEMPLATE.format(part="processor", name=name))
    refusal: UserError | None = None
    for form in (_items, _items_where_needed, _words_as_items, _words):
        try:
            text = _apply(tokenizer, template, [form(message, slot) for message in prompt], name, date)
            text = _continued(text, [_words(message, slot) for message in prompt], name)
        except UserError as error:
            refusal = refusal or error
            continue
        if _keeps_everything(text, prompt, token):
            bos = tokenizer.bos_token
            return text, not (bos and text.startswith(bos))
    raise refusal or UserError(f"the chat template of {name!r} leaves out or moves words or images of the prompt")


def _dated(template: str, date: str, name: str) -> str:
    """A template in which today is the given date.

    Raises:
        UserError: if it prints the date in a form that is worked out as it is applied.
    """
    day = datetime.fromisoformat(date)
    dated = TODAY.sub(lambda call: repr(day.strftime(call[2])), template)
    if "strftime_now(" in dated:
        raise UserError(
            f"the chat template of {name!r} prints today's date in a form that cannot be held; give prompts as texts"
        )
    return dated


def _apply(tokenizer: Any, template: str, messages: Sequence[Any], name: str, date: str) -> str:
    from jinja2 import TemplateError

    prefilled = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=_dated(template, date, name),
            tokenize=False,
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
        )
    except (TemplateError, ValueError, TypeError) as error:  # a template may fail at a form it does not expect
        reason = first_line(error)
        raise UserError(f"the chat template of {name!r} refuses the prompt: {reason}") from error


def _items(message: Message, slot: str) -> dict[str, Any]:
    """Words and images as items."""
    return message | {"content": list(_parts(message["content"]))}


def _items_where_needed(message: Message, slot: str) -> dict[str, Any]:
    """Items where there is an image, else a string."""
    return _items(message, slot) if IMAGE_SLOT in message["content"] else dict(message)


def _words_as_items(message: Message, slot: str) -> dict[str, Any]:
    """One item of words, the slots among them."""
    return message | {"content": [{"type": "text", "text": message["content"].replace(IMAGE_SLOT, slot)}]}


def _words(message: Message, slot: str) -> dict[str, Any]:
    """A string, the slots in it."""
    return message | {"content": message["content"].replace(IMAGE_SLOT, slot)}


def _parts(content: str) -> Iterator[dict[str, str]]:
    for number, words in enumerate(content.split(IMAGE_SLOT)):
        if number:
            yield {"type": "image"}
        if words:
            yield {"type": "text", "text": words}


def _keeps_everything(text: str, prompt: Sequence[Message], token: str) -> bool:
    """Whether the words (but for blanks around them) and the images stand in the text in the order of the prompt.

    A template that knows strings only writes a list of items as such, which is no prompt either.
    """
    if _LIST.search(text) and not any(_LIST.search(message["content"]) for message in prompt):
        return False
    wanted = [part.get("text", token).strip() for message in prompt for part in _parts(message["content"])]
    place = 0
    for part in wanted:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    slots = sum(message["content"].count(IMAGE_SLOT) for message in prompt)
    return text.count(token) == slots
