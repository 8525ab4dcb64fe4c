"The base that the repository holds: what is kept, who may not be in it, and how a run begins with it."
import json

import pytest

from ehr_r1.config import Run
from ehr_r1.data.samples import cuts_of
from ehr_r1.inference.checkpoints import ModelError, load_model
from ehr_r1.profiles import PROFILES, SIZED, is_ours, profile
from ehr_r1.stages import build, read_manifest
from ehr_r1.training import stages
from ehr_r1.training.models import SIZES, new_model, train_tokenizer

CUTS = dict(labevents={'Sodium': [120., 125, 130, 135, 138, 141, 144, 147, 150]})


def finished(folder, make, access):
    build(folder, make, {}, dict(access=access), 'training.stages')


@pytest.fixture
def made(tmp_path):
    "A function that makes a run with a base, of samples that are open or not."
    tokenizer = train_tokenizer(['Sodium p50\nyes\nno\n']*3, 320, by_line=True)
    model = new_model('tiny', tokenizer, 1, 64)

    def base(out):
        model.save_pretrained(out/'model')
        tokenizer.save_pretrained(out/'model')
        (out/'metrics.jsonl').write_text('{"step": 3}\n')
        return dict(parameters=model.num_parameters(), steps=3)

    def run(access):
        made = Run(access, tmp_path)
        build(made.hospital, lambda out: {}, {}, dict(patients=20, seed=5), 'hospital.hospital')
        finished(made.checkpoints/'base', base, access)
        finished(made.samples, lambda out: dict(cuts=CUTS, access=access), access)
        return made

    return run


@pytest.fixture
def kept(made, tmp_path, monkeypatch):
    "A folder with a kept base."
    folder = tmp_path/'kept'
    stages.keep_base(made('open'), folder)
    monkeypatch.setattr(stages, 'KEPT', folder)
    monkeypatch.setattr('ehr_r1.data.samples.KEPT', folder)
    return folder


def test_sizes_are_named_once():
    assert tuple(SIZES) == SIZED
    assert is_ours('kept') and not is_ours('Qwen/Qwen3-1.7B')
    assert all(is_ours(p.model) == (p.style == 'binned') for p in PROFILES.values())


@pytest.mark.parametrize('model, style', [
    ('small', 'binned'), ('kept', 'binned'), ('a/b', 'compact'), ('none', 'compact')])
def test_who_can_read_is_given_text(model, style):
    assert profile('demo', model=model).style == style
    assert profile('demo', model=model, style='official').style == 'official'


def test_who_begins_from_nothing_learns_from_records_too():
    assert profile('demo').record_loss == 0
    small = profile('demo', model='small')
    assert (small.record_loss, small.adapt_rate) == (.5, 3e-3)
    assert profile('demo', model='small', record_loss=0, adapt_rate=1e-4).adapt_rate == 1e-4


def test_nothing_but_weights_words_and_percentiles_is_kept(kept):
    kinds = ('.json', '.jsonl', '.jinja', '.safetensors')
    assert not [file.name for file in kept.iterdir() if file.suffix not in kinds]
    assert json.loads((kept/'cuts.json').read_text()) == CUTS
    about = json.loads((kept/'manifest.json').read_text())
    assert about['counts']['steps'] == 3
    assert about['hospital'] == dict(patients=20, seed=5)


def test_a_run_begins_with_what_is_kept(kept, tmp_path):
    run = Run('next', tmp_path)
    assert stages.build_base(run, profile('demo', model='kept'))
    assert not stages.build_base(run, profile('demo', model='kept'))
    model, _ = load_model(stages.model_at(run, 'base'), device='cpu')
    made = read_manifest(run.checkpoints/'base')
    assert made['counts']['kept'] and made['counts']['hospital']['patients'] == 20
    assert (run.checkpoints/'base'/'metrics.jsonl').exists()
    assert model.num_parameters() == read_manifest(run.checkpoints/'base')['counts']['parameters']
    assert cuts_of(profile('demo', model='kept').only('style', 'seed', 'model'), []) == CUTS


def test_who_was_not_asked_is_not_kept(made, tmp_path):
    with pytest.raises(ModelError, match='credentialed'):
        stages.keep_base(made('credentialed'), tmp_path/'kept')
    assert not (tmp_path/'kept').exists()


def test_it_is_said_how_a_base_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, 'KEPT', tmp_path/'nothing')
    with pytest.raises(ModelError, match='ehr_r1 keep'):
        stages.build_base(Run('r', tmp_path), profile('demo', model='kept'))
