"""What a change makes again: the table of changes and stages, on a copy of the package."""
import shutil

import pytest

from ehr_r1 import stages
from ehr_r1.stages import build, read_manifest

STAGES = {  # stage -> the module that its code stands in
    'hospital': 'hospital.hospital',
    'trajectories': 'data.trajectories',
    'index': 'data.index',
    'samples': 'data.samples',
    'knowledge': 'synthesis.open_knowledge',
    'graphs': 'synthesis.graphs',
    'chains': 'synthesis.chains',
    'predictions': 'evaluation.predictions',
    'training': 'training.stages',
    'answers': 'evaluation.answers',
    'scores': 'evaluation.benchmark',
    'reports': 'evaluation.reporting',
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A copy of the package that may be changed."
    copy = tmp_path/'ehr_r1'
    shutil.copytree(stages.PACKAGE, copy, ignore=shutil.ignore_patterns('__pycache__'))
    monkeypatch.setattr(stages, 'PACKAGE', copy)
    stages._read_module.cache_clear()
    yield copy
    stages._read_module.cache_clear()


def codes():
    return {stage: stages.code_of(module) for stage, module in STAGES.items()}


BEFORE = codes()


def made_again(change):
    "Stages whose key is another after a change."
    change()
    after = codes()
    return {stage for stage in STAGES if BEFORE[stage] != after[stage]}


def appended(file, text):
    return lambda: file.write_text(file.read_text(encoding='utf-8') + text, encoding='utf-8')


@pytest.mark.parametrize('file, text', [
    ('hospital/notes.py', '\n# a comment\n'),
    ('data/tasks.py', '\n# a comment\n\n'),
    ('data/tasks.py', '\n"A text that stands alone."\n'),
    ('profiles.py', '\nMORE = 1\n'),
    ('stages.py', '\nMORE = 1\n'),
    ('evaluation/published.csv', 'a,b,c,d,1,,\n'),
    ('pipeline.py', '\nMORE = 1\n'),
    ('evaluation/results.py', '\nMORE = 1\n'),
])
def test_what_determines_no_bytes_makes_nothing_again(package, file, text):
    assert made_again(appended(package/file, text)) == set()


@pytest.mark.parametrize('file', ['hospital/notes.py', 'hospital/orders.py', 'hospital/draws.py'])
def test_a_line_of_the_hospital_makes_the_hospital_again_and_nothing_on_real_tables(package, file):
    assert made_again(appended(package/file, '\nMORE = 1\n')) == {'hospital'}


def test_the_condition_library_is_code_of_the_hospital(package):
    change = appended(package/'hospital'/'library'/'conditions.toml', '\n# a condition more\n')
    assert made_again(change) == {'hospital'}


def test_a_rule_of_a_task_makes_the_index_and_what_follows_again(package):
    again = made_again(appended(package/'data'/'tasks.py', '\nMORE = 1\n'))
    assert {'index', 'samples', 'graphs', 'chains'} <= again
    assert not again & {'hospital', 'trajectories', 'knowledge', 'reports'}


def test_a_score_makes_no_data_again(package):
    again = made_again(appended(package/'scoring.py', '\nMORE = 1\n'))
    assert 'scores' in again
    assert not again & {'hospital', 'trajectories', 'index', 'samples', 'knowledge', 'graphs', 'chains'}


# -- what is made anew while it is read

def text_stage(folder, text):
    "A stage that writes a text."
    def make(out):
        (out/'text').write_text(text)
        return {}

    return build(folder, make, {}, dict(text=text), 'config')


def test_what_this_process_makes_anew_while_it_reads_it_is_read_again(tmp_path, capsys):
    first, second = tmp_path/'first', tmp_path/'second'
    texts = ['new']

    def copy(out):
        if texts:  # between the look at the manifest and the reading
            text_stage(first, texts.pop())
        (out/'text').write_text((first/'text').read_text())
        return {}

    text_stage(first, 'old')
    assert build(second, copy, dict(first=first), {}, 'config')
    assert 'second: what it reads was made anew meanwhile; once more' in capsys.readouterr().out
    assert (second/'text').read_text() == 'new'
    assert read_manifest(second)['inputs']['first'] == read_manifest(first)['content']
    assert not build(second, copy, dict(first=first), {}, 'config')
    text_stage(first, 'old')
    assert build(second, copy, dict(first=first), {}, 'config')
    assert (second/'text').read_text() == 'old'
