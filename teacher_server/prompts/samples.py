"""Checked rows become samples: token ids, label mask, key."""

from collections.abc import Sequence

from storage.request_table import RequestTableBuilder, merged_requests
from storage.selection import Selection
from teacher_server.config import LabelConfig
from teacher_server.prompts.bad_rows import BadRow, BadRowError
from teacher_server.prompts.chat import Chat, ChatTemplate, Tokenizer
from teacher_server.prompts.rows import GivenIds, PromptRow, Prompts
from teacher_server.prompts.turns import GivenResponse, end_of_turn, labelled_turns


def select_samples(
    prompts: Prompts, tokenizer: Tokenizer, label: LabelConfig, *, context: int, vocab_size: int
) -> Selection:
    """Tokenize good rows and give every sample its key; rows that fail here turn bad.

    Equal prompts are one sample with several sources. The key is of token ids and label mask
    alone: tools, options of the template and the text itself are in it through the ids.

    Args:
        prompts: Checked rows, taken one by one; ``prompts.bad`` grows by rows that do not fit.
        tokenizer: The teacher's, with its chat template.
        label: Mode and number of samples per prompt.
        context: Tokens that the teacher can attend to.
        vocab_size: Effective vocabulary.
    """
    template = ChatTemplate(tokenizer)
    found = RequestTableBuilder()
    for row in prompts.rows:
        try:
            if label.mode == "generate":
                prompt_ids, response = _prompt_ids(row, template), None
                count = label.sampling.samples_per_prompt
            else:
                prompt_ids, response = _with_response(row, template)
                count = 1
            _check_lengths(prompt_ids, response, context, vocab_size)
        except BadRowError as error:
            prompts.bad.append(BadRow(row.source.file, row.source.line, str(error)))
            continue
        for index in range(count):
            found.add(
                prompt_ids,
                index,
                response_ids=None if response is None else response.ids,
                label_mask=None if response is None else response.label_mask,
                sources=(row.source,),
            )
    return Selection(merged_requests(found.table()))


def _prompt_ids(row: PromptRow, template: ChatTemplate) -> list[int]:
    """What the teacher is given to answer."""
    if row.conversation is not None:
        return Chat(row.conversation, template).prompt_ids()
    if row.input_ids is not None:
        return list(row.input_ids)
    return template.tokenizer.encode(row.prompt or "", add_special_tokens=True)


def _with_response(row: PromptRow, template: ChatTemplate) -> tuple[list[int], GivenResponse]:
    """Score mode: prompt and response.

    Token ids are taken as they are. Text ends with what ends a turn of the chat template, where
    there are messages, and with the end-of-sequence token elsewhere.
    """
    if row.conversation is not None and row.completion is None:
        return labelled_turns(Chat(row.conversation, template))
    prompt_ids = _prompt_ids(row, template)
    if isinstance(row.completion, GivenIds):
        return prompt_ids, GivenResponse(list(row.completion.ids), row.completion.label_mask)
    tokenizer = template.tokenizer
    response_ids = tokenizer.encode(row.completion or "", add_special_tokens=False)
    end = None if row.conversation is None else end_of_turn(Chat(row.conversation, template))
    if end is not None:
        response_ids += tokenizer.encode(end, add_special_tokens=False)
    elif tokenizer.eos_token_id is not None:
        response_ids.append(tokenizer.eos_token_id)
    return prompt_ids, GivenResponse(response_ids, None)


def _check_lengths(
    prompt_ids: Sequence[int], response: GivenResponse | None, context: int, vocab_size: int
) -> None:
    if not prompt_ids:
        raise BadRowError("the prompt is empty after tokenization")
    if response is not None and not response.ids:
        raise BadRowError("the completion is empty after tokenization")
    ids = [*prompt_ids, *(response.ids if response else ())]
    if len(ids) + 1 > context:  # engines want room for one more token, also where they only score
        what = "prompt" if response is None else "prompt and completion"
        raise BadRowError(
            f"{what} of {len(ids)} tokens do not fit the teacher's context of {context}, "
            "which needs room for one more"
        )
    if max(ids) >= vocab_size:
        raise BadRowError(f"token id {max(ids)} leaves the vocabulary of {vocab_size}")
