"Chat templates of all habits: one prompt, one answer, one reading, in training, rewards, parsing and scoring."
from functools import cache

import pytest
from test_foreign_text import WORDS
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ehr_r1.data.serialize import record_text
from ehr_r1.data.tasks import TASKS
from ehr_r1.ehrmind.recipe import answer_in_form
from ehr_r1.evaluation.answers import prediction_of
from ehr_r1.evaluation.judging import judge, thinking
from ehr_r1.inference.asking import answer_status
from ehr_r1.inference.checkpoints import MODES, ModelError, chat_text, check_chat, load_model, mode_for
from ehr_r1.inference.engines import text_of
from ehr_r1.synthesis.support import read_record
from ehr_r1.training.examples import EXAMPLES, Writer, encode
from ehr_r1.training.models import train_tokenizer
from ehr_r1.training.rewards import accuracy_reward, ehrmind_answer, fault_of_format, format_reward

TURNS = ("{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}"
         '{%- endfor -%}')
START = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
END = '{%- endif -%}'
OFF = 'enable_thinking is defined and enable_thinking is false'
DEFAULT = ("{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nYou are a small model.<|im_end|>\\n' -}}"
           '{%- endif -%}')
HEADERS = """{{- '<|begin_of_text|>' -}}{%- if not date_string is defined -%}{%- if strftime_now is defined -%}
{%- set date_string = strftime_now('%d %b %Y') -%}{%- else -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}
{%- endif -%}
{%- for m in messages -%}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
{%- if m.role == 'system' -%}{{- 'Today Date: ' + date_string + '\\n\\n' -}}{%- endif -%}
{{- m.content | trim + '<|eot_id|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""
DEEPSEEK = """{%- for m in messages -%}{%- if m.role == 'system' -%}{{- m.content -}}{%- elif m.role == 'user' -%}
{{- '<｜User｜>' + m.content -}}{%- else -%}
{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}"""
EMPTY = "{{- '<think>\\n\\n</think>\\n\\n' -}}"
SHAPES = dict(
    qwen3=f'{TURNS}{START}{{%- if {OFF} -%}}{EMPTY}{END}{END}',
    chatml=TURNS + START + END,                  # Qwen2.5
    llama3=HEADERS,
    deepseek=DEEPSEEK,                           # opens the block in every prompt
    smollm2=DEFAULT + TURNS + START + END,
    opens_unless_off=f"{TURNS}{START}{{%- if {OFF} -%}}{EMPTY}{{%- else -%}}{{{{- '<think>\\n' -}}}}{END}{END}",
    always_closes=TURNS + START + EMPTY + END,   # was never meant to think
    thinks_on_one_line=f"{TURNS}{START}{{{{- '<think> ' -}}}}{END}",
)
every_shape = pytest.mark.parametrize('shape', SHAPES)
TAUGHT = MODES[:3]  # in which models are trained here

QUESTION = TASKS['labevents'].instruction
LABS = '## Labs [2150-01-01 08:00]\n- Sodium 140 mEq/L'
LABEL = ['Sodium', 'Potassium']
CHAIN = ('## Extraction\n**Labs [2150-01-01 08:00]**: Sodium 140 mEq/L\n\n## Reasoning\n1. Sodium is followed.\n\n'
         '## Final Results\nSodium\nPotassium')
SAMPLE = dict(sample_id='s', task='labevents', family='decision', label=LABEL,
              text=record_text(['## Patient\n- gender F', LABS], QUESTION))


@cache
def tokenizer_of(shape):
    tokenizer = train_tokenizer(WORDS + [SAMPLE['text'], CHAIN]*50, 600)
    tokenizer.chat_template = SHAPES[shape]
    return tokenizer


def example(shape, mode):
    chain = CHAIN if mode == 'think' else None
    row, why = Writer(tokenizer_of(shape), 2_000, 2_000).example(SAMPLE, mode, chain)
    assert why == ''
    return dict(zip(EXAMPLES, row))


def written(shape, row):
    "What a model that learnt an example perfectly writes, as an engine gives it."
    tokenizer = tokenizer_of(shape)
    encoded = encode(row, tokenizer)
    ids = [i for i, bears in zip(encoded['input_ids'], encoded['completion_mask']) if bears]
    return text_of(tokenizer, ids, row['tokens'], ended=True)


@every_shape
@pytest.mark.parametrize('mode', TAUGHT)
def test_one_form_for_all_templates(shape, mode):
    row, thinks = example(shape, mode), mode == 'think'
    text = row['prompt'] + row['answer']
    assert text.count('<think>') == text.count('</think>') == 1
    if thinks:
        assert row['prompt'].count('think>') == 0
        assert row['answer'].startswith(f'<think>\n{CHAIN}\n</think>\n\n')
    else:
        assert row['prompt'].endswith('<think>\n\n</think>\n\n')
        assert row['answer'] == '\n'.join(LABEL)
    assert 'Sodium 140' in row['prompt'] and QUESTION in row['prompt']


@every_shape
def test_what_is_asked_is_what_was_trained(shape):
    writer = Writer(tokenizer_of(shape), 2_000, 2_000)
    for mode in TAUGHT:
        prompt, *_ = writer.prompt(SAMPLE['text'], 'labevents', mode)
        assert prompt == example(shape, mode)['prompt']


@every_shape
@pytest.mark.parametrize('mode', TAUGHT)
def test_what_was_learnt_is_read_and_rewarded(shape, mode):
    row = example(shape, mode)
    made = written(shape, row)
    assert made.text == row['answer']
    assert answer_status(made) == 'answered'
    line = dict(sample_id='s', task='labevents', kind='decision', text=made.text, status='answered')
    prediction = prediction_of(line)
    assert prediction['answer'] == prediction['written'] == LABEL
    if mode == 'think':
        assert (accuracy_reward(made.text, LABEL, 'decision'), format_reward(made.text)) == (1, 1)
        assert thinking(made.text) == CHAIN
        record = SAMPLE['text'].split('\n' + QUESTION)[0]
        assert judge(made.text, LABEL, read_record(record, 'compact'))['sound']


@every_shape
def test_a_chain_that_was_cut_off_is_no_answer(shape):
    row = example(shape, 'think')
    half = row['answer'][:row['answer'].index('## Reasoning')]
    made = text_of(tokenizer_of(shape), tokenizer_of(shape)(half).input_ids, 1, ended=False)
    assert answer_status(made) == 'unclosed'
    assert accuracy_reward(half, LABEL, 'decision') == 0
    assert fault_of_format(half) == 'think block not closed'


@every_shape
def test_the_form_of_ehrmind(shape):
    said = answer_in_form('So.', dict(answer='25.24'), tokenizer_of(shape))
    messages = [dict(role='system', content='S'), dict(role='user', content='U')]
    text = chat_text(tokenizer_of(shape), messages, 'think') + said
    assert text.count('<think>') == 1
    assert ehrmind_answer(said, ('answer',)) == dict(answer='25.24')


@every_shape
def test_a_note_closes_no_block(shape):
    note = 'Sleeps well. <think>\n</think>\nyes <think>'
    messages = [dict(role='system', content='S'), dict(role='user', content=note)]
    prompts = {mode: chat_text(tokenizer_of(shape), messages, mode) for mode in TAUGHT}
    assert [prompt.count('<think>') for prompt in prompts.values()] == [1, 0, 1]


@every_shape
def test_a_model_as_it_comes_gets_nothing_of_ours(shape):
    tokenizer = tokenizer_of(shape)
    messages = [dict(role='system', content='S'), dict(role='user', content='U')]
    own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    direct, free = (chat_text(tokenizer, messages, mode) for mode in ('direct', 'free'))
    assert free == own.replace('Today Date: ' + own.partition('Today Date: ')[2][:11], 'Today Date: 26 Jul 2024')
    assert '\n/think' not in direct and '\n/no_think' not in direct
    assert direct.count('<think>') == direct.count('</think>')
    assert ('<think>' in direct) == ('think' in SHAPES[shape])
    assert mode_for('risk', 'free') == 'direct'


@pytest.mark.parametrize('shape', ['llama3'])
def test_a_prompt_is_the_same_on_every_day(shape):
    messages = [dict(role='system', content='S'), dict(role='user', content='U')]
    assert 'Today Date: 26 Jul 2024' in chat_text(tokenizer_of(shape), messages, 'plain')


@pytest.mark.parametrize('shape, config, kind', [
    ('chatml', Qwen2Config, Qwen2ForCausalLM),
    ('llama3', LlamaConfig, LlamaForCausalLM),
    ('deepseek', Qwen2Config, Qwen2ForCausalLM),
    ('smollm2', LlamaConfig, LlamaForCausalLM),
])
def test_bases_of_the_papers_load(tmp_path, shape, config, kind):
    tokenizer = tokenizer_of(shape)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, vocab_size=640, max_position_embeddings=512)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    kind(config(**size, **ends)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, again = load_model(tmp_path, device='cpu')
    check_chat(again, trained=True)
    writer = Writer(again, 2_000, 2_000)
    for mode in TAUGHT:
        prompt, *_ = writer.prompt(SAMPLE['text'], 'labevents', mode)
        assert prompt == example(shape, mode)['prompt']


def test_only_training_demands_an_end_and_tags_that_stay():
    no_end, no_tags = (train_tokenizer(WORDS, 600) for _ in range(2))
    no_end.eos_token = None
    no_tags.add_tokens([AddedToken('<think>', special=True)], special_tokens=True)
    for tokenizer, lacks in ((no_end, 'end-of-answer'), (no_tags, 'drops <think>')):
        check_chat(tokenizer)
        with pytest.raises(ModelError, match=lacks):
            check_chat(tokenizer, trained=True)
