// What a native module can say of the machine it runs on; each backend defines it once.
#pragma once
#include <map>
#include <string>

namespace cnnfast {
std::map<std::string, std::string> device_info();
}
