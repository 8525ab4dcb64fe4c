"Models from scratch, the chat format, and training examples: nothing lost that must stay, nothing kept that cannot fit."
from functools import cache
import polars as pl, pytest
from hypothesis import given, settings, strategies as st
from ehr_r1.profiles import VARIANTS, profile
from ehr_r1.config import Run
from ehr_r1.data.tasks import TASKS
from ehr_r1.scoring import parse_answer
from ehr_r1.synthesis.support import read_record, supported
from ehr_r1.training.examples import BLOCK, EXAMPLES, LISTED, Writer, encode, in_order, names_of, patient_texts, quotes, scan_examples, shorten, show_example
from ehr_r1.training.rewards import accuracy_reward, fault_of_format
from ehr_r1.inference.checkpoints import MODES, ModelError, answer_text, chat_text, check_chat, load_model
from ehr_r1.training.models import new_model, train_tokenizer
from records import at, row, store

EVENTS = [f'## Labs [2150-01-{d:02} 08:00]\n- Sodium 14{d % 10} mEq/L\n- Potassium 4.{d % 10} mEq/L [3.3-5.1]' for d in range(1, 29)]
QUESTION = TASKS['labevents'].instruction
words = lambda text: len(text.split())

def record(events, summary=0, admission=True):
    head = ['## Patient\n- anchor_age 50, gender F']
    if summary: head.append('## Discharge summary [2149-12-01 10:00]\n- ' + 'word '*summary + '\n\nHistory:\n\n## not an event\nend')
    if admission: head.append('## Admission [2150-01-01 00:00]\n- EW EMER.')
    return '\n\n'.join([*head, *events]) + '\n' + QUESTION

@pytest.fixture(scope='module')
def tokenizer(): return train_tokenizer([record(EVENTS), 'yes', 'no', 'Sodium\nPotassium']*3, 700)

@given(st.lists(st.sampled_from(EVENTS), max_size=20), st.integers(0, 80), st.booleans(), st.integers(20, 400))
def test_a_cut_record_keeps_head_question_and_the_latest_events(events, summary, admission, limit):
    text = record(events, summary, admission)
    short, tokens, gone = shorten(text, 'labevents', limit, words)
    first, question = record([], 0, admission).rsplit('\n', 1)
    assert short.startswith('## Patient\n- anchor_age 50, gender F') and short.endswith('\n' + QUESTION)
    assert ('## Admission' in short) == admission
    body = short.removesuffix('\n' + QUESTION)
    kept = body.count('## Labs [')
    assert body.endswith('\n\n'.join(events[len(events) - kept:])) # the newest stay, whole
    assert gone == len(events) - kept + (bool(summary) and '## Discharge summary' not in short)
    assert words(short) <= tokens and (tokens <= limit or not kept)
    if tokens <= limit and gone == 0: assert short == text
    assert shorten(short, 'labevents', limit, words)[0] == short

def test_a_long_summary_goes_before_the_window_and_a_short_one_stays():
    assert '## Discharge' not in shorten(record(EVENTS[:8], 300), 'labevents', 200, words)[0]
    cut = shorten(record(EVENTS, 20), 'labevents', 120, words)[0]
    assert '## Discharge summary' in cut and EVENTS[-1] in cut and EVENTS[0] not in cut

@cache
def SMALL(): return train_tokenizer(['- Sodium 140'], 300)

@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200))
def test_any_text_survives_the_tokenizer(text):
    t = SMALL()
    clean = text.encode('utf-8', 'ignore').decode()
    assert t.decode(t(clean, add_special_tokens=False).input_ids) == clean

def test_yes_and_no_are_one_token_each_even_if_never_seen():
    t = train_tokenizer(['- Sodium 140'], 300)
    assert [len(t(w).input_ids) for w in ('yes', 'no')] == [1, 1]

def test_prompt_and_answer_are_the_conversation_of_the_template(tokenizer):
    messages = [dict(role='system', content='S'), dict(role='user', content='U')]
    for mode, chain in (('plain', None), ('no_think', None), ('think', 'a chain')):
        user = 'U' if mode == 'plain' else f'U\n/{mode}'
        said = [messages[0], dict(role='user', content=user), dict(role='assistant', content=answer_text(chain, ['A', 'B']))]
        whole = tokenizer.apply_chat_template(said, tokenize=False)
        prompt = chat_text(tokenizer, messages, mode)
        assert whole == prompt + answer_text(chain, ['A', 'B']) + '<|im_end|>\n'
        assert prompt.endswith('</think>\n\n') == (mode != 'think')
    with pytest.raises(ValueError, match='mode'): chat_text(tokenizer, messages, 'loud')

@pytest.mark.parametrize('template, lacks', [
    (None, 'no chat template'),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", 'does not close the think block'),
    ("{{ messages[0].content }}", 'drops the system or the user'),
    ("{{ raise_exception('no system role') }}", 'fails on a system'),
    ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}{% if add_generation_prompt and not enable_thinking %}"
     "</think>{% endif %}", 'drops the think block')])
def test_a_template_that_cannot_think_is_refused(template, lacks):
    t = train_tokenizer(['- Sodium 140'], 300); t.chat_template = template
    with pytest.raises(ModelError, match=lacks): check_chat(t)

def test_models_are_the_same_for_a_seed_and_only_safe_files_are_read(tokenizer, tmp_path):
    import torch
    a, b, c = (new_model('tiny', tokenizer, s, 64) for s in (1, 1, 2))
    same = lambda x, y: all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters()))
    assert same(a, b) and not same(a, c)
    a.save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    torch.save(a.state_dict(), tmp_path/'pytorch_model.bin'); (tmp_path/'model.safetensors').unlink()
    with pytest.raises(ModelError, match='cannot be loaded'): load_model(tmp_path)
    with pytest.raises(ModelError, match='no such folder'): load_model(tmp_path/'gone')

def test_only_the_answer_bears_loss_and_what_does_not_fit_is_left_out(tokenizer):
    writer = Writer(tokenizer, 150, 40)
    sample = dict(sample_id='s', task='labevents', family='decision', label=['Sodium', 'Potassium'], text=record(EVENTS))
    for mode, chain in (('plain', None), ('no_think', None)):
        row = dict(zip(EXAMPLES, writer.example(sample, mode, chain)[0])); x = encode(row, tokenizer)
        said = [i for i, loss in zip(x['input_ids'], x['completion_mask']) if loss]
        assert tokenizer.decode(said) == 'Sodium\nPotassium<|im_end|>' and row['dropped'] > 0
        assert len(x['input_ids']) - len(said) <= row['tokens'] <= 150
        assert show_example(row, tokenizer).count('class="loss"') == len(said)
    assert writer.example(sample | dict(label=['Sodium']*40), 'plain')[1] == 'answer is longer than a model may answer'
    assert Writer(tokenizer, 20, 40).example(sample, 'plain')[1] == 'head and question are longer than the context'

def test_only_the_answers_of_a_model_from_scratch_end_with_a_new_line(tokenizer):
    sample = dict(sample_id='s', task='labevents', family='decision', label=['Sodium', 'Potassium'], text=record(EVENTS))
    for scratch, end in ((False, ''), (True, '\n')):
        writer = Writer(tokenizer, 150, 300, scratch=scratch)
        for mode, chain in (('plain', None), ('no_think', None), ('think', '')):
            row = dict(zip(EXAMPLES, writer.example(sample, mode, chain)[0])); x = encode(row, tokenizer)
            assert row['answer'].endswith('Sodium\nPotassium' + end) and parse_answer(row['answer']).lines == sample['label']
            assert row['answer_tokens'] == sum(x['completion_mask']) and x['input_ids'][-1] == tokenizer.eos_token_id
            if chain == '': assert fault_of_format(row['answer']) == '' and accuracy_reward(row['answer'], sample['label'], 'decision') == 1
        size = writer.example(sample, 'think', '')[0][8] # the new line counts
        assert Writer(tokenizer, 150, size, scratch=scratch).example(sample, 'think', '')[0]
        assert Writer(tokenizer, 150, size - 1, scratch=scratch).example(sample, 'think', '')[0] is None

@pytest.mark.parametrize('variant', VARIANTS)
def test_a_bare_chain_is_whole_and_quotes_what_the_model_sees(tokenizer, variant):
    sample = dict(sample_id='s', task='labevents', family='decision', label=['Sodium', 'Potassium'], text=record(EVENTS))
    row, why = Writer(tokenizer, 150, 300).example(sample, 'think', '', variant)
    answer, prompt = row[5], row[4]
    chain = answer.split('<think>\n')[1].split('\n</think>')[0]
    assert why == 'bare' and not fault_of_format(answer, sections=variant != 'no_sections') and '01-28 08:00' in chain and row[9] > 0
    quoted = [l for l in chain.splitlines() if l.startswith('**')]
    events = read_record(prompt.split('<|im_start|>user\n')[1].split('\n' + QUESTION)[0], 'compact')
    assert quoted and all(supported(l, events) for l in quoted) and 'follows' not in chain
    empty = Writer(tokenizer, 150, 300).example(sample | dict(text=QUESTION), 'think', '', variant)
    assert (empty[0] is None) == (variant != 'no_sections')

def test_a_chain_without_its_evidence_gives_way_to_a_bare_one_only_where_that_is_asked_for(tokenizer):
    sample = dict(sample_id='s', task='labevents', family='decision', label=['Sodium'], text=record(EVENTS))
    chain = lambda line: f'## Extraction\n{line}\n\n## Reasoning\n1. It was measured before, so it is measured again now.\n\n## Final Results\nSodium'
    seen, gone = (next(l for l in quotes(record([e]).removesuffix('\n' + QUESTION), 0) if 'Sodium' in l) for e in (EVENTS[-1], EVENTS[0]))
    long = chain(seen).replace('now.', 'now, and again.'*200)
    for bare in (False, True):
        writer = Writer(tokenizer, 150, 300, scratch=bare)
        row, why = writer.example(sample, 'think', chain(seen))
        assert why == '' and seen in row[5]
        for lost in (chain(gone), long):
            row, why = writer.example(sample, 'think', lost)
            assert (why == 'bare' and gone not in row[5] and 'again' not in row[5]) if bare else (row is None and why)

@given(st.integers(0, 2**63))
def test_quoted_lines_stand_in_the_record(seed):
    text = record(EVENTS).removesuffix('\n' + QUESTION)
    lines, events = quotes(text, seed), read_record(text, 'compact')
    assert lines and len(set(lines)) == len(lines) and all(supported(l, events) for l in lines)

@given(st.integers(0, 2**63))
def test_listed_names_stand_in_the_record_and_their_number_varies(seed):
    text = record(EVENTS).removesuffix('\n' + QUESTION)
    names = names_of(text, seed)
    assert 1 <= len(names) == len(set(names)) <= LISTED and all(f'\n- {n}' in text for n in names) and names == names_of(text, seed)
    many = '\n'.join(f'- {"abcdefghijklmnopqrst"[k]*4} {k}' for k in range(20))
    assert {len(names_of(many, s)) for s in range(200)} == set(range(1, LISTED + 1)) and names_of('## Labs\n- 12', seed) == []
    assert names_of('- ' + 'long '*9 + '\n- short 1', seed) == ['short'] # no name is cut

def test_texts_of_stage_0_quote_the_record_and_end_as_answers_do(tokenizer):
    before = [row('labevents', at(1, h), 7, {'item_name': n, 'value': '4.1'}) for h, n in enumerate('Sodium Potassium Lactate Glucose'.split(), 1)]
    rows = store([row('patients', cells=['60.0', 'F']), *before], 'strict')
    made = [text for seed in range(40) for text in patient_texts(rows, Writer(tokenizer, 300, 300, scratch=True), seed)]
    quoted = [answer for prompt, answer in made if prompt]
    assert .5*len(made) < len(quoted) < len(made)
    for answer in quoted:
        results, again = answer.split('## Final Results\n')[1].split('</think>\n\n')
        assert results == again and again.endswith('\n') and set(again.split()) <= {'anchor_age', 'Sodium', 'Potassium', 'Lactate', 'Glucose'}
    assert all('think' not in answer for prompt, answer in made if not prompt)

def test_each_example_comes_once_an_epoch_in_the_same_order(tmp_path):
    n = 2*BLOCK + 5
    rows = [(f's{i}', 't', 'decision', 'plain', '', 'x', [], 1, 1, 0) for i in range(n)]
    frame = pl.DataFrame(rows, schema=EXAMPLES, orient='row')
    frame.head(1_500).write_parquet(tmp_path/'examples-00000.parquet'); frame.tail(n - 1_500).write_parquet(tmp_path/'examples-00001.parquet')
    once, three = ([r['sample_id'] for r in in_order(tmp_path, 1, e)] for e in (1, 3))
    assert once == frame['sample_id'].to_list() == scan_examples(tmp_path).collect()['sample_id'].to_list()
    epochs = [three[k*n:(k+1)*n] for k in range(3)]
    assert epochs[0] == once and all(sorted(e) == sorted(once) for e in epochs) and epochs[1] != once != epochs[2] != epochs[1]
    assert three == [r['sample_id'] for r in in_order(tmp_path, 1, 3)]

def test_no_examples_are_an_error_and_not_an_endless_wait(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match='no examples'): next(in_order(tmp_path, 1, 0))
        pl.DataFrame(schema=EXAMPLES).write_parquet(tmp_path/'examples-00000.parquet')

@pytest.mark.parametrize('bad', [dict(ablations='graph'), dict(scaling='2'), dict(scaling='x'), dict(curriculum='maybe'), dict(adapt_rate='-1')])
def test_bad_training_settings_are_refused(bad):
    with pytest.raises(ValueError): profile('demo', **bad)
