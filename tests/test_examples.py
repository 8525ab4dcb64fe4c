"Models from scratch, the chat format, training examples: nothing is lost that must stay or kept that cannot fit."
from functools import cache

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import at, row, store

from ehr_r1.config import Run
from ehr_r1.data.tasks import TASKS
from ehr_r1.inference.checkpoints import ModelError, answer_text, chat_text, check_chat, load_model
from ehr_r1.profiles import profile
from ehr_r1.scoring import parse_answer
from ehr_r1.synthesis.support import read_record, supported
from ehr_r1.training.examples import (
    _SHUFFLE_BLOCK,
    EXAMPLES,
    Writer,
    encode,
    in_order,
    scan_examples,
    shorten,
    show_example,
)
from ehr_r1.training.models import new_model, train_tokenizer
from ehr_r1.training.record_texts import LISTED, listed_names, patient_texts, quotes, write_texts
from ehr_r1.training.rewards import accuracy_reward, fault_of_format


def labs_of(day):
    return (f'## Labs [2150-01-{day:02} 08:00]\n- Sodium 14{day % 10} mEq/L\n'
            f'- Potassium 4.{day % 10} mEq/L [3.3-5.1]')


EVENTS = [labs_of(day) for day in range(1, 29)]
FIRST = '## Patient\n- anchor_age 50, gender F'
ADMISSION = '## Admission [2150-01-01 00:00]\n- EW EMER.'
QUESTION = TASKS['labevents'].instruction
SUMMARY_TEXT = '\n\nHistory:\n\n## not an event\nend'


def words(text):
    return len(text.split())


def record(events, summary=0, admission=True):
    "A record and its question; the summary has so many words."
    parts = [FIRST]
    if summary:
        parts.append('## Discharge summary [2149-12-01 10:00]\n- ' + 'word '*summary + SUMMARY_TEXT)
    if admission:
        parts.append(ADMISSION)
    return '\n\n'.join([*parts, *events]) + '\n' + QUESTION


def without_question(text):
    return text.removesuffix('\n' + QUESTION)


def sample_of(text, label=('Sodium', 'Potassium')):
    about = dict(sample_id='s', task='labevents', family='decision')
    return about | dict(label=list(label), text=text)


SAMPLE = sample_of(record(EVENTS))
SODIUM_ASKED = sample_of(record(EVENTS), ['Sodium'])


def example(writer, sample, *how):
    "An example by name of its columns."
    made, why = writer.example(sample, *how)
    return dict(zip(EXAMPLES, made)), why


def loss_bearing(encoded):
    return [token for token, bears in zip(encoded['input_ids'], encoded['completion_mask']) if bears]


@pytest.fixture(scope='module')
def tokenizer():
    return train_tokenizer([record(EVENTS), 'yes', 'no', 'Sodium\nPotassium']*3, 700)


@cache
def small_tokenizer():
    return train_tokenizer(['- Sodium 140'], 300)


# --- records that are too long

CUT = dict(
    events=st.lists(st.sampled_from(EVENTS), max_size=20),
    summary=st.integers(0, 80),
    admission=st.booleans(),
    limit=st.integers(20, 400),
)


@given(**CUT)
def test_a_cut_record_keeps_head_and_question(events, summary, admission, limit):
    short, _, _ = shorten(record(events, summary, admission), 'labevents', limit, words)
    assert short.startswith(FIRST)
    assert short.endswith('\n' + QUESTION)
    assert ('## Admission' in short) == admission


@given(**CUT)
def test_a_cut_record_keeps_the_latest_events_whole(events, summary, admission, limit):
    short, _, dropped = shorten(record(events, summary, admission), 'labevents', limit, words)
    body = without_question(short)
    kept = body.count('## Labs [')
    lost_summary = bool(summary) and '## Discharge summary' not in short
    assert body.endswith('\n\n'.join(events[len(events) - kept:]))
    assert dropped == len(events) - kept + lost_summary


@given(**CUT)
def test_a_cut_record_fits_and_is_not_cut_again(events, summary, admission, limit):
    text = record(events, summary, admission)
    short, tokens, dropped = shorten(text, 'labevents', limit, words)
    assert words(short) <= tokens
    assert tokens <= limit or '## Labs [' not in without_question(short)
    if tokens <= limit and dropped == 0:
        assert short == text
    assert shorten(short, 'labevents', limit, words)[0] == short


def test_a_long_summary_goes_before_the_window():
    text = record(EVENTS[:8], summary=300)
    short, _, _ = shorten(text, 'labevents', 200, words)
    assert '## Discharge' not in short


def test_a_short_summary_stays():
    text = record(EVENTS, summary=20)
    short, _, _ = shorten(text, 'labevents', 120, words)
    assert '## Discharge summary' in short
    assert EVENTS[-1] in short
    assert EVENTS[0] not in short


# --- tokenizer, chat format, model

@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = small_tokenizer()
    clean = text.encode('utf-8', 'ignore').decode()
    ids = tokenizer(clean, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == clean


@pytest.mark.parametrize('word', ['yes', 'no'])
def test_yes_and_no_are_one_token_each_even_if_never_seen(word):
    assert len(small_tokenizer()(word).input_ids) == 1


@pytest.mark.parametrize('mode, chain, user', [
    ('plain', None, 'U'),
    ('no_think', None, 'U\n/no_think'),
    ('think', 'a chain', 'U\n/think'),
])
def test_prompt_and_answer_are_the_conversation_of_the_template(tokenizer, mode, chain, user):
    system = dict(role='system', content='S')
    answer = answer_text(chain, ['A', 'B'])
    asked = [system, dict(role='user', content='U')]
    said = [system, dict(role='user', content=user), dict(role='assistant', content=answer)]
    prompt = chat_text(tokenizer, asked, mode)
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    assert whole == prompt + answer + '<|im_end|>\n'
    assert prompt.endswith('</think>\n\n') == (mode != 'think')


def test_a_mode_that_does_not_exist_is_named(tokenizer):
    messages = [dict(role=role, content='x') for role in ('system', 'user')]
    with pytest.raises(ValueError, match='mode'):
        chat_text(tokenizer, messages, 'loud')


@pytest.mark.parametrize('template, lacks', [
    (None, 'no chat template'),
    ("{{ messages[0].content }}", 'drops the system or the user'),
    ("{{ raise_exception('no system role') }}", 'fails on a system'),
])
def test_a_template_that_cannot_ask_is_refused(template, lacks):
    tokenizer = train_tokenizer(['- Sodium 140'], 300)
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=lacks):
        check_chat(tokenizer)
    with pytest.raises(ModelError, match=lacks):
        Writer(tokenizer, 150, 40)


def same_weights(one, two):
    pairs = zip(one.parameters(), two.parameters())
    return all(torch.equal(a, b) for a, b in pairs)


def test_models_are_the_same_for_a_seed(tokenizer):
    one = new_model('tiny', tokenizer, seed=1, context=64)
    again = new_model('tiny', tokenizer, seed=1, context=64)
    other = new_model('tiny', tokenizer, seed=2, context=64)
    assert same_weights(one, again)
    assert not same_weights(one, other)


def test_only_safe_files_are_read(tokenizer, tmp_path):
    model = new_model('tiny', tokenizer, 1, 64)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path/'pytorch_model.bin')
    (tmp_path/'model.safetensors').unlink()
    with pytest.raises(ModelError, match='cannot be loaded'):
        load_model(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match='no such folder'):
        load_model(tmp_path/'gone')


# --- one example

@pytest.mark.parametrize('mode', ['plain', 'no_think'])
def test_only_the_answer_bears_loss(tokenizer, mode):
    made, _ = example(Writer(tokenizer, 150, 40), SAMPLE, mode)
    encoded = encode(made, tokenizer)
    said = loss_bearing(encoded)
    assert tokenizer.decode(said) == 'Sodium\nPotassium<|im_end|>'
    assert made['dropped'] > 0
    assert len(encoded['input_ids']) - len(said) <= made['tokens'] <= 150
    assert show_example(made, tokenizer).count('class="loss"') == len(said)


@pytest.mark.parametrize('context, label, why', [
    (150, ['Sodium']*40, 'answer is longer than a model may answer'),
    (20, ['Sodium'], 'head and question are longer than the context'),
])
def test_what_does_not_fit_is_left_out(tokenizer, context, label, why):
    writer = Writer(tokenizer, context, 40)
    sample = sample_of(record(EVENTS), label)
    assert writer.example(sample, 'plain') == (None, why)


@pytest.mark.parametrize('scratch, end', [(False, ''), (True, '\n')])
@pytest.mark.parametrize('mode, chain', [
    ('plain', None),
    ('no_think', None),
])
def test_only_the_answers_of_a_model_from_scratch_end_with_a_new_line(tokenizer, scratch, end, mode, chain):
    writer = Writer(tokenizer, 150, 300, scratch=scratch)
    made, _ = example(writer, SAMPLE, mode, chain)
    encoded = encode(made, tokenizer)
    assert made['answer'].endswith('Sodium\nPotassium' + end)
    assert parse_answer(made['answer']).lines == SAMPLE['label']
    assert made['answer_tokens'] == sum(encoded['completion_mask'])
    assert encoded['input_ids'][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize('scratch', [False, True])
def test_the_new_line_counts(tokenizer, scratch):
    def with_room_for(size):
        writer = Writer(tokenizer, 150, size, scratch=scratch)
        return writer.example(SAMPLE, 'no_think')[0]

    size = dict(zip(EXAMPLES, with_room_for(300)))['answer_tokens']
    assert with_room_for(size)
    assert with_room_for(size - 1) is None


# --- chains

def evidence(event):
    "Two lines of an event, as a chain quotes them."
    lines = quotes(without_question(record([event])), 0)
    return '\n'.join(sorted(lines, key=lambda line: 'Sodium' not in line)[:2])


SEEN, GONE = evidence(EVENTS[-1]), evidence(EVENTS[0])


def chain_on(line, more=''):
    why = f'1. Measured before, so measured again: Sodium.{more}'
    return f'## Extraction\n{line}\n\n## Reasoning\n{why}\n\n## Final Results\nSodium'


@pytest.mark.parametrize('scratch', [False, True])
def test_a_chain_with_its_evidence_is_used(tokenizer, scratch):
    writer = Writer(tokenizer, 150, 300, scratch=scratch)
    made, why = example(writer, SODIUM_ASKED, 'think', chain_on(SEEN))
    assert why == ''
    assert SEEN in made['answer']
    assert fault_of_format(made['answer']) == ''
    assert accuracy_reward(made['answer'], SODIUM_ASKED['label'], 'decision') == 1


LOST = [chain_on(GONE), chain_on(SEEN, ' And again.'*200)]


@pytest.mark.parametrize('scratch', [False, True])
@pytest.mark.parametrize('chain', LOST, ids=['evidence cut away', 'too long'])
def test_a_lost_chain_leaves_its_sample_out(tokenizer, chain, scratch):
    writer = Writer(tokenizer, 150, 300, scratch=scratch)
    made, why = writer.example(SODIUM_ASKED, 'think', chain)
    assert made is None
    assert why


# --- texts of stage 0

@given(st.integers(0, 2**63))
def test_quoted_lines_stand_in_the_record(seed):
    text = without_question(record(EVENTS))
    lines, events = quotes(text, seed), read_record(text, 'compact')
    assert lines
    assert len(set(lines)) == len(lines)
    assert all(supported(line, events) for line in lines)


@given(st.integers(0, 2**63))
def test_listed_names_stand_in_the_record(seed):
    text = without_question(record(EVENTS))
    names = listed_names(text, seed)
    assert 1 <= len(names) <= LISTED
    assert len(names) == len(set(names))
    assert all(f'\n- {name}' in text for name in names)
    assert names == listed_names(text, seed)


def test_the_number_of_listed_names_varies():
    many = '\n'.join(f'- {letter*4} {i}' for i, letter in enumerate('abcdefghijklmnopqrst'))
    numbers = {len(listed_names(many, seed)) for seed in range(200)}
    assert numbers == set(range(1, LISTED + 1))


@pytest.mark.parametrize('text, names', [
    ('## Labs\n- 12', []),
    ('- ' + 'long '*9 + '\n- short 1', ['short']),  # no name is cut
])
@pytest.mark.parametrize('seed', range(5))
def test_what_is_no_name_is_not_listed(text, names, seed):
    assert listed_names(text, seed) == names


def patient(subject):
    "A patient's rows of the store, with a laboratory value for each name."
    rows = [row('patients', cells=['60.0', 'F'], subject=subject)]
    for hour, name in enumerate(('Sodium', 'Potassium', 'Lactate', 'Glucose'), 1):
        cells = dict(item_name=name, value='4.1')
        rows.append(row('labevents', at(1, hour), 7, cells, subject=subject))
    return store(rows, 'strict')


@pytest.fixture(scope='module')
def texts(tokenizer):
    "A patient's texts with forty seeds: (prompt, answer)."
    writer, rows = Writer(tokenizer, 300, 300, scratch=True), patient(1)
    return [text for seed in range(40) for text in patient_texts(rows, writer, seed)]


def test_most_texts_of_stage_0_quote(texts):
    quoting = [prompt for prompt, _ in texts if prompt]
    assert .5*len(texts) < len(quoting) < len(texts)


def test_texts_of_stage_0_end_as_answers_do(texts):
    known = {'anchor_age', 'Sodium', 'Potassium', 'Lactate', 'Glucose'}
    for answer in (answer for prompt, answer in texts if prompt):
        results, again = answer.split('## Final Results\n')[1].split('</think>\n\n')
        assert results == again
        assert again.endswith('\n')
        assert set(again.split()) <= known


def test_texts_that_do_not_quote_are_records_alone(texts):
    assert all('think' not in answer for prompt, answer in texts if not prompt)


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    "A run with a store of five shards, ten patients each."
    run = Run('r', tmp_path_factory.mktemp('stored'))
    run.trajectories.mkdir(parents=True)
    (run.trajectories/'manifest.json').write_text('{"counts": {"integers": {}}}')
    for shard in range(5):
        subjects = range(100 + shard, 150 + shard, 5)
        rows = pl.concat([patient(subject) for subject in subjects])
        rows.write_parquet(run.trajectories/f'shard-{shard:05d}.parquet')
    return run


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize('tokens, shards', [
    (300, 2),
    (3_500, 4),
    (1_000_000, 5),
])
def test_workers_are_no_part_of_the_texts_of_stage_0(stored, tokenizer, tmp_path, tokens, shards):
    writer = Writer(tokenizer, 300, 300, scratch=True)
    folders = [tmp_path/workers for workers in '123']
    counts = [write_texts(stored, tokens, writer, folder, 42, 'train', int(folder.name)) for folder in folders]
    written = [bytes_of(folder) for folder in folders]
    ids = scan_examples(folders[0]).collect()['sample_id']
    read = {int(sample_id.split('-')[0]) % 5 for sample_id in ids}
    assert len(read) == shards
    assert written[0] == written[1] == written[2]
    assert counts[0] == counts[1] == counts[2]


def test_texts_of_stage_0_are_read_until_there_are_enough(stored, tokenizer, tmp_path):
    writer = Writer(tokenizer, 300, 300, scratch=True)
    few = write_texts(stored, 300, writer, tmp_path/'few', 42)
    all_of_them = write_texts(stored, 1_000_000, writer, tmp_path/'all', 42)
    assert 300 <= few['tokens'] < all_of_them['tokens']


# --- order

@pytest.fixture
def two_files(tmp_path):
    "Examples of more than two blocks in two files; their ids in order."
    number = 2*_SHUFFLE_BLOCK + 5
    ids = [f's{i}' for i in range(number)]
    frame = pl.DataFrame([dict(sample_id=name) for name in ids], EXAMPLES)
    frame.head(1_500).write_parquet(tmp_path/'examples-00000.parquet')
    frame.tail(number - 1_500).write_parquet(tmp_path/'examples-00001.parquet')
    return ids


def ids_in_order(folder, epochs):
    return [example['sample_id'] for example in in_order(folder, 1, epochs)]


def test_the_first_epoch_takes_examples_as_they_are_written(two_files, tmp_path):
    assert ids_in_order(tmp_path, 1) == two_files
    assert scan_examples(tmp_path).collect()['sample_id'].to_list() == two_files


def test_each_example_comes_once_an_epoch_in_another_order(two_files, tmp_path):
    number, three = len(two_files), ids_in_order(tmp_path, 3)
    starts = range(0, 3*number, number)
    first, second, third = (three[start:start + number] for start in starts)
    assert first == two_files
    assert sorted(second) == sorted(third) == sorted(two_files)
    assert first != second != third != first
    assert three == ids_in_order(tmp_path, 3)


def test_a_folder_without_examples_is_an_error_and_not_an_endless_wait(tmp_path):
    with pytest.raises(ValueError, match='no examples'):
        next(in_order(tmp_path, 1, 0))


def test_an_empty_file_is_an_error_and_not_an_endless_wait(tmp_path):
    pl.DataFrame(schema=EXAMPLES).write_parquet(tmp_path/'examples-00000.parquet')
    with pytest.raises(ValueError, match='no examples'):
        next(in_order(tmp_path, 1, 0))


@pytest.mark.parametrize('bad', [
    dict(ablations='graph'),
    dict(ablations='no_sections', variants='knowledge'),
    dict(variants='no_knowledge'),
    dict(scaling='2'),
    dict(scaling='x'),
    dict(curriculum='maybe'),
    dict(adapt_rate='-1'),
])
def test_bad_training_settings_are_refused(bad):
    with pytest.raises(ValueError):
        profile('demo', **bad)
