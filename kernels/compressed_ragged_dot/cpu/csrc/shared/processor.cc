// Loaded by ctypes from ../../__init__.py.

#include "processor.h"

extern "C" bool QmoeHasInstructionSet(const char* name) { return !ChooseInstructionSet(name).empty(); }
