"""What must not become open by accident: licences that only mention one, programs beside models, small counts."""
import ast
import json
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ehr_r1
from ehr_r1.data.tables import SYNTHETIC_LICENCE, licence_of
from ehr_r1.evaluation.reporting import SMALLEST, count_in_words, suppress
from ehr_r1.hospital.hospital import LICENSE
from ehr_r1.inference.checkpoints import ModelError, load_model, load_tokenizer
from ehr_r1.training.models import new_model, train_tokenizer
from ehr_r1.transfer.ehrshot.files import standing
from ehr_r1.transfer.mimic_cdm.files import cdm_is_synthetic

# --- licences

LEGAL_CODE = Path('/usr/share/common-licenses/CC0-1.0')  # on Debian
MENTIONS = [
    '',
    'PhysioNet Credentialed Health Data License 1.5.0',
    'This is NOT CC0. PhysioNet Credentialed Health Data License 1.5.0',
    'Credentialed. (The demo is under the Open Database License; this is not the demo.)',
    'CC0 1.0 Universal does not apply',
    'Not CC0 1.0 Universal',
    'CC0 1.0 Universal\nPhysioNet Credentialed Health Data License 1.5.0',
    f'These are not {SYNTHETIC_LICENCE}',
    f'{SYNTHETIC_LICENCE} The notes are real.',
    'No synthetic data',
    'A synthetic hospital beside real patients',
    '## ODC Open Database License (ODbL)\n\n### Preamble\n\nDoes not cover this database.']

@pytest.mark.parametrize('text', MENTIONS)
def test_mention_of_a_licence_is_none(tmp_path, text):
    assert licence_of(text) == ''
    (tmp_path/'LICENSE.txt').write_text(text)
    said = standing(dict(events=tmp_path, license=tmp_path/'LICENSE.txt'))
    assert (said['access'], said['source']) == ('credentialed', 'EHRSHOT')
    assert not cdm_is_synthetic(tmp_path)

OPEN = [
    'CC0 1.0 Universal', '# CC0 1.0 universal\r\n', 'ODC Open Database License (ODbL)', 'Open Database License v1.0']

@pytest.mark.parametrize('text', OPEN)
def test_name_of_an_open_licence_alone_opens(text):
    assert licence_of(text) == 'open'

def test_hospital_is_open_by_what_it_says_of_itself():
    assert licence_of(LICENSE) == 'synthetic'

def test_demo_is_open_by_the_whole_of_its_licence(demo):
    text = (demo/'LICENSE.txt').read_text()
    assert licence_of(text) == licence_of(text.replace('\n', '\r\n  ')) == 'open'
    assert licence_of(text + '\nThis does not hold for the notes.') == ''
    assert licence_of(text[:len(text)//2]) == ''

def test_legal_code_of_cc0_opens():
    if not LEGAL_CODE.is_file():
        pytest.skip('no copy of the legal code of CC0 on this computer')
    text = LEGAL_CODE.read_text()
    assert licence_of(text) == 'open'
    assert licence_of('Not under:\n' + text) == ''

# --- models bring no program

LIBRARY = Path(ehr_r1.__file__).parent

def loading_calls():
    "Every call in the library that loads something of transformers, PEFT or vLLM: where, what, and its arguments."
    for path in sorted(LIBRARY.rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.endswith(('.from_pretrained', '.from_config', 'load_dataset')) or called == 'LLM':
                    yield path.name, called, {word.arg: ast.unparse(word.value) for word in node.keywords}

def test_no_call_lets_a_model_bring_code():
    calls = [call for call in loading_calls() if call[1] != 'PeftModel.from_pretrained']
    assert len(calls) >= 3
    for where, called, words in calls:
        assert words.get('trust_remote_code') == 'False', (where, called)
    weights = [words for _, called, words in calls if 'Model' in called]
    assert all(words.get('use_safetensors') == 'True' for words in weights)

CODE = 'open({!r}, "w").close()\n'

@pytest.fixture
def checkpoint(tmp_path):
    "A folder whose configuration names a program beside it, and the file that appears when the program runs."
    caught = tmp_path/'it-ran'
    names = {f'Auto{kind}': 'mine.Mine' for kind in ('Config', 'ModelForCausalLM')}
    tokenizer = dict(tokenizer_class='Mine', auto_map=dict(AutoTokenizer=['mine.Mine', None]))
    folder = tmp_path/'model'
    folder.mkdir()
    (folder/'config.json').write_text(json.dumps(dict(model_type='mine', auto_map=names)))
    (folder/'tokenizer_config.json').write_text(json.dumps(tokenizer))
    (folder/'mine.py').write_text(CODE.format(str(caught)))
    return folder, caught

@pytest.mark.parametrize('load', [load_model, load_tokenizer])
def test_code_beside_a_model_is_not_run(checkpoint, load):
    folder, caught = checkpoint
    with pytest.raises(ModelError, match='code of its own, which is never run'):
        load(folder)
    assert not caught.exists()

def test_weights_in_a_pickle_are_not_opened(tmp_path):
    tokenizer = train_tokenizer(['a yes', 'b no'], 320)
    tokenizer.save_pretrained(tmp_path)
    model = new_model('tiny', tokenizer, 1, 64)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path/'pytorch_model.bin')
    with pytest.raises(ModelError, match='safetensors'):
        load_model(tmp_path)

def test_adapter_in_a_pickle_is_not_opened(tmp_path):
    (tmp_path/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path='x')))
    (tmp_path/'adapter_model.bin').write_bytes(b'')
    with pytest.raises(ModelError, match='a pickle is not opened'):
        load_model(tmp_path)

# --- counts that others give away

def told(counts, **words):
    "The counts that are left of a table of credentialed data."
    table = pl.DataFrame(dict(task=[f't{i}' for i in range(len(counts))], samples=counts) | words)
    return suppress(table, ['samples'], 'credentialed')['samples'].to_list()

ALONE = [
    ([120, 7, 45, 300], [120, None, None, 300]),         # 7 is the total less the others
    ([120, 7, 3, 300], [120, None, None, 300]),          # so is 10, but nobody knows who has which part
    ([120, 4, 3, 300], [None, None, None, 300]),         # seven together are a small count, too
    ([7, 0, 45, 300], [None, 0, None, 300]),             # nobody hides behind nobody
    ([7], [None]),
    ([120, 45], [120, 45])]

@pytest.mark.parametrize('counts, left', ALONE)
def test_total_less_what_is_shown_tells_no_small_count(counts, left):
    assert told(counts) == left

def test_total_of_a_group_tells_no_small_count():
    "Each task's answers sum to its samples, which another table has."
    answers = dict(task=['a', 'a', 'a', 'b', 'b', 'b'], answer=['x', 'y', 'z']*2)
    assert told([50, 5, 40, 30, 8, 20], **answers) == [50, None, None, 30, None, None]

CELLS = st.tuples(st.sampled_from('ab'), st.sampled_from('xyz'), st.integers(0, 40))

@given(st.lists(CELLS, max_size=20, unique_by=lambda row: row[:2]))
def test_no_difference_is_small(rows):
    table = pl.DataFrame(rows, dict(task=pl.String, answer=pl.String, samples=pl.Int64), orient='row')
    left = suppress(table, ['samples'], 'credentialed')
    both = table.with_columns(left=left['samples'])
    assert not both['left'].is_between(1, SMALLEST - 1).any()
    groups = [both, *both.partition_by('task'), *both.partition_by('answer')]
    for group in groups:
        difference = group['samples'].sum() - group['left'].sum()
        nothing_else = group.filter(pl.col('left') > 0).is_empty()
        assert difference == 0 or difference >= SMALLEST or nothing_else

def test_note_on_a_hidden_row_is_hidden():
    table = pl.DataFrame(dict(task=['a', 'b', 'c'], samples=[7, 45, 300], note=['x', 'y', 'z']))
    assert suppress(table, ['samples'], 'credentialed')['note'].to_list() == [None, None, 'z']
    assert suppress(table, ['samples'], 'open').equals(table)

def test_sentence_tells_no_complement():
    said = [count_in_words(number, 'credentialed', of=100) for number in (0, 9, 10, 90, 91, 100)]
    assert said == ['0', 'fewer than 10', '10', '90', 'all but fewer than 10', '100']
    assert count_in_words(95, 'open', of=100) == '95'
