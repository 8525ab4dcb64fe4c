"""What must not become open by accident: licences that only mention one, connections in the clear, small counts."""
from pathlib import Path

import pytest

from ehr_r1.data.tables import SYNTHETIC_LICENCE, licence_of
from ehr_r1.hospital.hospital import LICENSE
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
