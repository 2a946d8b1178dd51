"""Which tokens of a conversation the assistant wrote.

A turn is labelled only where the conversation holds it as it stood when the assistant wrote it:
the text before it is the prompt that the assistant was given, and nothing written later changed
it. Templates that rewrite earlier turns (those that drop the thinking of earlier turns, for one)
break this, and are refused rather than guessed at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from teacher_server.prompts.bad_rows import BadRowError
from teacher_server.prompts.chat import Chat, Span

_WAY_OUT = "or give token ids (input_ids with completion_ids)"


@dataclass(frozen=True, slots=True)
class GivenResponse:
    """A response that the teacher is made to follow."""

    ids: list[int]
    label_mask: tuple[bool, ...] | None
    """Which tokens are labelled, None for all."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """One labelled turn in the text of the conversation."""

    prompt_end: int
    """Where the prompt of this turn ends, generation prompt included."""
    spans: tuple[Span, ...]
    """What the assistant wrote after it."""
    text: str
    """Everything up to the end of the last span."""


def labelled_turns(chat: Chat) -> tuple[list[int], GivenResponse]:
    """Prompt and response of a conversation in which at least one turn is labelled.

    The prompt ends where the first labelled turn begins. What follows the last labelled turn is
    left out. A single labelled turn is labelled to the end of what the template writes; with
    several turns the mask holds what the assistant wrote, and its end-of-turn tokens.

    Raises:
        BadRowError: if the template leaves something out or rewrites a turn.
    """
    turns = chat.conversation.labelled
    if turns[0] == 0:
        raise BadRowError('messages[0] is an answer to nothing; give it "train": false')
    count = turns[-1] + 1
    text = chat.text(count, generation_prompt=False)
    chat.require_written(count, text)
    return _one_turn(chat, text) if len(turns) == 1 else _many_turns(chat, text)


def _one_turn(chat: Chat, text: str) -> tuple[list[int], GivenResponse]:
    turn = chat.conversation.labelled[0]
    chat.require_turn_written(turn, text)
    prompt = chat.text(turn, generation_prompt=True)
    if not text.startswith(prompt):
        raise _unlike_prompt(turn)
    chat.require_header_before(turn, prompt, text[len(prompt) :])
    prompt_ids = chat.ids(turn, generation_prompt=True)
    whole = chat.ids(turn + 1, generation_prompt=False)
    if whole[: len(prompt_ids)] != prompt_ids:
        raise _straddling(turn)
    return prompt_ids, GivenResponse(whole[len(prompt_ids) :], None)


def _many_turns(chat: Chat, text: str) -> tuple[list[int], GivenResponse]:
    found = [_find_turn(chat, turn) for turn in chat.conversation.labelled]
    for number, turn in zip(chat.conversation.labelled, found, strict=True):
        if not text.startswith(turn.text):
            raise _rewritten(number)
    cuts = [found[0].prompt_end]
    cuts += [place for turn in found for span in turn.spans for place in span]
    ids = chat.ids(chat.conversation.labelled[-1] + 1, generation_prompt=False)
    places = _token_places(chat, text, ids, cuts)
    begin, end = places[0], places[-1]
    mask = [False] * (end - begin)
    for first, last in zip(places[1::2], places[2::2], strict=True):
        mask[first - begin : last - begin] = [True] * (last - first)
    response = GivenResponse(ids[begin:end], None if all(mask) else tuple(mask))
    return ids[:begin], response


def _find_turn(chat: Chat, turn: int) -> _Turn:
    """Where a turn stands, from the conversation up to it alone."""
    prompt = chat.text(turn, generation_prompt=True)
    text = chat.text(turn + 1, generation_prompt=False)
    if not text.startswith(prompt):
        raise _unlike_prompt(turn)
    spans: Sequence[Span]
    if chat.marks_generation:
        marked = chat.generation_spans(turn + 1)
        spans = [(max(begin, len(prompt)), end) for begin, end in marked if end > len(prompt)]
    else:
        end = len(prompt) + _length_without_trailer(chat, turn, text[len(prompt) :])
        spans = [(len(prompt), end)]
    spans = [span for span in spans if span[0] < span[1]]
    if not spans:
        raise BadRowError(f"the chat template writes nothing for messages[{turn}]")
    chat.require_header_before(turn, prompt, text[spans[0][0] :])
    text = text[: spans[-1][1]]
    chat.require_turn_written(turn, text)
    return _Turn(len(prompt), tuple(spans), text)


def end_of_turn(chat: Chat) -> str | None:
    """The special tokens that end the next answer of this conversation, None without any."""
    written = chat.answered("x")
    span = _end_of_turn(written, chat.template.special_tokens)
    return None if span is None else written[slice(*span)]


def _length_without_trailer(chat: Chat, turn: int, written: str) -> int:
    """Characters that the assistant wrote: content, calls and the tokens that end its turn.

    What a template adds behind them is white space, or an end of the whole text after white
    space; the assistant has stopped by then. Where a template writes no end-of-turn token, a turn
    is its content, or all up to the end of its calls.
    """
    span = _end_of_turn(written, chat.template.special_tokens)
    if span is not None:
        return span[1]
    message = chat.conversation.messages[turn]
    if "tool_calls" not in message:
        for wanted in (message["content"], message["content"].strip()):
            if wanted.strip() and wanted in written:
                return written.rindex(wanted) + len(wanted)
    return len(written.rstrip())


def _end_of_turn(written: str, special_tokens: Sequence[str]) -> Span | None:
    """The first run of special tokens among those that end a text, with or without white space."""
    found: Span | None = None
    place = len(written)
    in_run = False
    while place:
        if written[place - 1].isspace():
            place -= 1
            in_run = False
            continue
        token = next((t for t in special_tokens if written.endswith(t, 0, place)), None)
        if token is None:
            break
        end = found[1] if found is not None and in_run else place
        place -= len(token)
        found, in_run = (place, end), True
    return found


def _token_places(chat: Chat, text: str, ids: Sequence[int], cuts: Sequence[int]) -> list[int]:
    """For every cut of the text the number of tokens before it.

    The pieces between cuts are tokenized one by one, so the cost is linear. A tokenizer that
    treats the beginning of a text in its own way is asked for the whole beginning instead.

    Raises:
        BadRowError: if a token lies on both sides of a cut.
    """
    places: list[int] = []
    begin = before = 0
    for cut in cuts:
        piece = chat.template.tokenizer.encode(text[begin:cut], add_special_tokens=False)
        if list(ids[before : before + len(piece)]) == piece:
            before += len(piece)
        else:
            beginning = chat.template.tokenizer.encode(text[:cut], add_special_tokens=False)
            if list(ids[: len(beginning)]) != beginning:
                raise _straddling(None)
            before = len(beginning)
        places.append(before)
        begin = cut
    return places


def _straddling(turn: int | None) -> BadRowError:
    whose = "an assistant turn" if turn is None else f"messages[{turn}]"
    return BadRowError(
        f"a token holds both the beginning or end of {whose} and text of the chat template "
        "beside it, often a line break; strip the content, " + _WAY_OUT
    )


def _unlike_prompt(turn: int) -> BadRowError:
    return BadRowError(
        f"the chat template rewrites earlier turns or begins messages[{turn}] unlike its own "
        "generation prompt; set chat_template_kwargs so that both agree, give what follows the "
        f"generation prompt as completion, {_WAY_OUT}"
    )


def _rewritten(turn: int) -> BadRowError:
    return BadRowError(
        f"the chat template rewrites earlier turns, so messages[{turn}] does not stand in the "
        'conversation as it was written; label the last turn only ("label_turns": "last"), '
        f"make one row of every turn, {_WAY_OUT}"
    )
