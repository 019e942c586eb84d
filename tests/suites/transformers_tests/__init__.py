"""
transformers' own common tests as a package: what `fetch.py` unpacked, and beside it stand-ins for the modules that
those tests import and the source distribution leaves out.
"""

from fetch import suites_folder

__path__.append(str(suites_folder()))
