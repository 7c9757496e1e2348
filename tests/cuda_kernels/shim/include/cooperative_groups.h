// Clusters are in emulation.h.
#pragma once
