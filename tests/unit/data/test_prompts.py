"""Templates, chat templates, length limits and tokenizers that lose text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qurl.config import DataConfig, OverlongPrompts
from qurl.config.compose import compose
from qurl.data import Problem, build_prompts

KEY = "data.train"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, so that lengths are counted by eye."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def problem(text="1+1?", row=0, messages=None, **columns):
    columns = {"question": text, **columns}
    return Problem(row=row, place=f"line {row + 1}", text=text, messages=messages, answer="2", data_source="x",
                   columns=columns, extra={"level": 1})  # fmt: skip


def refused(words, problems, tokenizer, **options):
    with pytest.raises(ValueError) as caught:
        build_prompts(problems, tokenizer, DataConfig(**options), KEY)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_plain_prompt_is_the_filled_template(tokenizer):
    config = DataConfig(prompt_template="{problem} Level {level}. Put it in \\boxed{{}}.")
    (prompt,) = build_prompts([problem("a{b}?", row=17, level=3)], tokenizer, config, KEY).prompts
    assert prompt.text == "a{b}? Level 3. Put it in \\boxed{}."
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert (prompt.prompt_id, prompt.ground_truth, prompt.data_source, prompt.extra) == ("r000017", "2", "x", {"level": 1})


def test_problem_names_the_configured_column_even_where_another_has_that_name(tokenizer):
    (prompt,) = build_prompts([problem("the question", problem="other")], tokenizer, DataConfig(), KEY).prompts
    assert prompt.text == "the question"


@pytest.mark.parametrize(
    ("template", "words"),
    [("{problme}", ["problme", "question", "line 1"]), ("{problem} in \\boxed{}", ["doubled"]), ("{problem", ["expected '}'"]),
     ("Solve it.", ["names no column"]), ("{problem.x}", ["AttributeError"]), ("{problem:d}", ["ValueError"]), ("", ["no column"])],
)  # fmt: skip
def test_a_template_that_does_not_fit_is_refused(tokenizer, template, words):
    refused(["data.prompt_template", *words], [problem()], tokenizer, prompt_template=template)


def test_the_chat_template_wraps_system_prompt_history_and_user_turn(tokenizer):
    chatty = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHAT)
    config = DataConfig(chat_template=True, system_prompt="Think.", prompt_template="Q: {problem}")
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "1+1?"}]
    texts = [p.text for p in build_prompts([problem(), problem(messages=history, row=1)], chatty, config, KEY).prompts]
    assert texts == [
        "<system>Think.<user>Q: 1+1?<assistant>",
        "<system>Think.<user>hi<assistant>ho<user>Q: 1+1?<assistant>",
    ]
    own_system = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "1+1?"}]
    refused(["line 1", "data.system_prompt"], [problem(messages=own_system)], chatty, chat_template=True, system_prompt="Think.")
    raising = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, chat_template="{{ raise_exception('no') }}")
    refused(["line 1", "chat template"], [problem()], raising, chat_template=True)


def test_chat_options_that_contradict_are_refused(tokenizer):
    refused(["data.chat_template", "no chat template"], [problem()], tokenizer, chat_template=True)
    refused(["data.system_prompt", "data.chat_template"], [problem()], tokenizer, system_prompt="x")
    two_turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "1+1?"}]
    refused(["line 1", "data.chat_template"], [problem(messages=two_turns)], tokenizer)
    single = build_prompts([problem(messages=two_turns[1:])], tokenizer, DataConfig(), KEY)
    assert single.prompts[0].text == "1+1?"


def test_overlong_prompts_are_dropped_and_counted_or_refused(tokenizer):
    problems = [problem("x" * n, row=n) for n in (3, 5, 6, 9)]
    found = build_prompts(problems, tokenizer, DataConfig(max_prompt_tokens=5), KEY)
    assert [p.prompt_id for p in found.prompts] == ["r000003", "r000005"]
    assert found.num_dropped == 2
    refused(["line 7", "6 tokens", "max_prompt_tokens=5"], problems, tokenizer, max_prompt_tokens=5,
            overlong_prompts=OverlongPrompts.error)  # fmt: skip
    refused(["none of 4", "max_prompt_tokens=2", "shortest has 3"], problems, tokenizer, max_prompt_tokens=2)
    refused(["max_prompt_tokens=0"], problems, tokenizer, max_prompt_tokens=0)


def lossy(characters):
    """A tokenizer of single characters without a token for unknown ones: it drops them, silently."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    )


def test_a_tokenizer_that_loses_text_is_refused(tokenizer):
    refused(["model.tokenizer", "0 tokens"], [problem("12+3")], lossy("ab"))
    refused(["model.tokenizer", "loses text"], [problem("12+3")], lossy("12+"))
    assert build_prompts([problem("12+1")], lossy("12+"), DataConfig(), KEY).prompts[0].token_ids == [0, 1, 2, 0]
    late = [problem(row=i) for i in range(20)] + [problem(row=20)]
    late[-1] = replace(late[-1], text="")
    refused(["line 21", "no token"], late, tokenizer)


def test_special_tokens_are_added_to_plain_prompts_only(tokenizer):
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))])
    bos = backend.token_to_id("<bos>")
    marked = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", chat_template="<bos>" + CHAT)
    (plain,) = build_prompts([problem()], marked, DataConfig(), KEY).prompts
    (chat,) = build_prompts([problem()], marked, DataConfig(chat_template=True), KEY).prompts
    assert plain.token_ids.count(bos) == chat.token_ids.count(bos) == 1
    assert plain.token_ids[0] == chat.token_ids[0] == bos


def test_the_prompt_of_dapo_is_added_to_plain_rows_and_not_again_to_chats_that_hold_it(tokenizer):
    template = compose(["data=dapo_math", "model.path=m"]).data.prompt_template
    assert template == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    filled = template.format(problem="1+1?")
    rows = [problem(), problem(filled, row=1, messages=[{"role": "user", "content": filled}]),
            problem(row=2, messages=[{"role": "user", "content": "1+1?"}])]  # fmt: skip
    assert [p.text for p in build_prompts(rows, tokenizer, DataConfig(prompt_template=template), KEY).prompts] == [filled] * 3


BOXED = "{problem}\nLet's think step by step and output the final answer within \\boxed{{}}."
INSTRUCTED = "1+1\nLet's think step by step and output the final answer within \\boxed{}."


GSM8K = "{question}\nLet's think step by step and give the final answer after \"####\"."


@pytest.mark.parametrize("template", [BOXED, GSM8K, "{problem}"])
def test_an_instruction_that_stands_in_the_row_is_not_added_again(tokenizer, template):
    chat = [{"role": "user", "content": INSTRUCTED}]
    config = DataConfig(prompt_template=template)
    (prompt,) = build_prompts([problem(INSTRUCTED, messages=chat)], tokenizer, config, KEY).prompts
    assert prompt.text == INSTRUCTED
    bare = [problem("1+1", messages=[{"role": "user", "content": "1+1"}])]
    assert build_prompts(bare, tokenizer, config, KEY).prompts[0].text == template.format(problem="1+1", question="1+1")


def test_a_plain_row_that_ends_as_the_template_does_stays_as_it_is(tokenizer):
    (prompt,) = build_prompts([problem(INSTRUCTED)], tokenizer, DataConfig(prompt_template=BOXED), KEY).prompts
    assert prompt.text == INSTRUCTED
    (prompt,) = build_prompts([problem("2=")], tokenizer, DataConfig(prompt_template="{problem}="), KEY).prompts
    assert prompt.text == "2=="  # a sign is no instruction


@pytest.fixture
def marked(tokenizer):
    """<s> before and </s> behind every text."""
    from tokenizers.processors import TemplateProcessing

    found = tokenizer.__class__(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT,
    )
    ids = {name: found.convert_tokens_to_ids(name) for name in ("<s>", "</s>")}
    found.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=list(ids.items()))
    return found


def test_what_the_tokenizer_appends_is_taken_off_and_a_beginning_stands_once(marked, caplog):
    assert marked("ab")["input_ids"][-1] == marked.eos_token_id
    for template in ("{problem}", "<s>{problem}"):
        config = DataConfig(prompt_template=template)
        (prompt,) = build_prompts([problem("ab")], marked, config, KEY).prompts
        assert marked.convert_ids_to_tokens(prompt.token_ids) == ["<s>", "a", "b"]
    assert "appends </s>" in caplog.text


def test_a_control_token_in_a_row_is_text_unless_rows_are_rendered_prompts(marked, caplog):
    from qurl.config import ControlTokens

    (prompt,) = build_prompts([problem("a</s>b", row=4)], marked, DataConfig(), KEY).prompts
    assert marked.convert_ids_to_tokens(prompt.token_ids) == ["<s>", *"a</s>b"]
    assert prompt.text == "a</s>b"
    for word in ("line 5", "</s>", "data.control_tokens=keep"):
        assert word in caplog.text
    (prompt,) = build_prompts([problem("a</s>b")], marked, DataConfig(control_tokens=ControlTokens.keep), KEY).prompts
    assert marked.convert_ids_to_tokens(prompt.token_ids) == ["<s>", "a", "</s>", "b"]
    chat = [{"role": "user", "content": "<s>"}]
    (prompt,) = build_prompts([problem("<s>", messages=chat)], marked, DataConfig(chat_template=True), KEY).prompts
    assert marked.convert_ids_to_tokens(prompt.token_ids) == list("<user><s><assistant>")


def test_variables_of_the_chat_template_reach_it(tokenizer):
    template = CHAT + "{% if not enable_thinking %}<think></think>{% endif %}"
    chatty = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    texts = [
        build_prompts([problem()], chatty, DataConfig(chat_template=True, chat_template_kwargs=kwargs), KEY).prompts[0].text
        for kwargs in ({"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert texts == ["<user>1+1?<assistant>", "<user>1+1?<assistant><think></think>"]
    refused(["enable_thinkin", "did you mean enable_thinking"], [problem()], chatty, chat_template=True,
            chat_template_kwargs={"enable_thinkin": False})
    refused(["tokenize", "set by qurl"], [problem()], chatty, chat_template=True, chat_template_kwargs={"tokenize": True})
    refused(["data.chat_template=true"], [problem()], chatty, chat_template_kwargs={"enable_thinking": True})


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ none.x.y }}", "{{ messages[0]['content'] + 1 }}", "{% for %}", "{{ nope() }}"]
)
def test_whatever_a_chat_template_raises_is_one_line_about_it(tokenizer, template):
    chatty = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    refused(["line 1", "chat template fails", "data.chat_template"], [problem()], chatty, chat_template=True)
