#include "kron/version.h"

namespace kron {

int version() {
    return KRON_VERSION;
}

const char* version_string() {
    return KRON_VERSION_STRING;
}

}  // namespace kron
