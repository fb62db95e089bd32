# make train_deit          builds ./train_deit, for the GPU when there is one, else for the CPU
# make test                builds and runs every test
# make test_deit           builds ./test_deit, which compares with a dump: ./test_deit dev/reference/dumps/FILE
# make asan | make tsan    builds the programs and device tests with sanitizers, in build/cpu-fp32-asan and -tsan
# make compare | bench     trains next to the PyTorch reference, comparing losses | times
# make dumps | data        remakes the PyTorch dumps | the bundled images
# make check               checks that the trainers are self-contained and share the same bytes
# make sync FROM=FILE.cu   copies the shared sections of one trainer into the others
# make clean               removes what was built
#
# DEVICE=cuda|cpu          instead of the detected one      PRECISION=FP32|BF16  default FP32 on the CPU, BF16 on the GPU
# ARCH=sm_80|sm_90|native  of the GPU                       NO_MPI=1 NO_OPENBLAS=1  as if it were not installed

PROGRAMS = $(basename $(wildcard train_*.cu test_*.cu))
DEVICE_TESTS = $(basename $(wildcard dev/test/*.cu dev/cuda/*.cu))
GOALS_WITHOUT_BUILD = help test check sync dumps data clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# ---- what is here. Each absence says what it costs. Only what was found is remembered, in build/probe
CXX ?= g++
NVCC ?= nvcc
ifneq ($(filter-out $(GOALS_WITHOUT_BUILD),$(MAKECMDGOALS)),)
say = $(if $(filter 0,$(MAKELEVEL)),$(info $(1)))
# $(call probe,NAME,PROGRAM,FLAGS): does a program of one line compile and link?
probe = $(shell mkdir -p build/probe; f=build/probe/$(1)-$(notdir $(firstword $(CXX))); test -f $$f || { \
    printf '%b' '$(2)' | $(CXX) -x c++ - -o $$f.tmp $(3) >/dev/null 2>&1 && mv $$f.tmp $$f; } && echo yes)

ifneq ($(call probe,compiler,int main() { return sizeof(int[1]) == 4 && __cplusplus >= 201703L ? 0 : 1; },-std=c++17),yes)
$(error no C++17 compiler: "$(CXX)" cannot compile and link; install g++ (apt install g++), or say CXX=...)
endif
$(call say,compiler:  $(CXX) $(shell $(CXX) -dumpfullversion -dumpversion))

HAS_NVCC := $(shell command -v $(NVCC) 2>/dev/null)
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m 1 '^GPU')
ifeq ($(DEVICE),)
  DEVICE := $(if $(HAS_NVCC),$(if $(HAS_GPU),cuda,cpu),cpu)
  $(call say,device:    $(DEVICE) ($(if $(HAS_GPU),found $(HAS_GPU),nvidia-smi -L lists no GPU); $(if $(HAS_NVCC),nvcc is here,no nvcc: a GPU needs the CUDA toolkit); DEVICE=cuda or cpu overrides))
else ifneq ($(filter $(DEVICE),cuda cpu),)
  $(call say,device:    $(DEVICE) (as asked))
else
  $(error DEVICE is "$(DEVICE)"; it can be cuda or cpu)
endif
ifeq ($(DEVICE)$(HAS_NVCC),cuda)
  $(error DEVICE=cuda needs nvcc, and "$(NVCC)" was not found; install the CUDA toolkit and put nvcc into PATH, or say DEVICE=cpu)
endif
PRECISION := $(or $(PRECISION),$(if $(filter cuda,$(DEVICE)),BF16,FP32))
ifeq ($(filter $(PRECISION),FP32 BF16),)
  $(error PRECISION is "$(PRECISION)"; it can be FP32 or BF16)
endif
$(call say,precision: $(PRECISION))

COMMA := ,
# MPI's wrapper knows its flags; of them nvcc understands -I, -L and -l
MPI_FLAGS := $(if $(NO_MPI)$(VARIANT),,$(filter -I% -L% -l%,$(shell mpicxx -show 2>/dev/null)))
HAS_MPI := $(if $(MPI_FLAGS),$(call probe,mpi,\043include <mpi.h>\nint main() { return MPI_Init(0$(COMMA) 0); },$(MPI_FLAGS)))
ifeq ($(DEVICE),cuda)
  ARCH ?= $(if $(HAS_GPU),native,sm_80)
  HAS_NCCL := $(if $(NO_MPI),,$(call probe,nccl,\043include <nccl.h>\nint main() { return ncclGetErrorString(ncclSuccess) == 0; },$(addprefix -I,$(wildcard $(dir $(HAS_NVCC))../include)) $(addprefix -L,$(wildcard $(dir $(HAS_NVCC))../lib64)) -lnccl))
  MULTI_GPU := $(and $(HAS_MPI),$(HAS_NCCL))
  $(call say,arch:      $(ARCH) ($(if $(HAS_GPU),of this machine's GPU,no GPU here to ask); ARCH=sm_80 or sm_90 overrides))
  $(call say,several GPUs: $(if $(MULTI_GPU),yes (NCCL and MPI),no: $(if $(NO_MPI),NO_MPI is set,$(if $(HAS_NCCL),,NCCL is not found (apt install libnccl-dev) )$(if $(HAS_MPI),,MPI is not found (apt install libopenmpi-dev)))))
else
  MULTI_GPU := $(HAS_MPI)
  # with AVX-512 the built-in matrix product is the faster one (dev/cuda/SPEED.md)
  HAS_AVX512 := $(shell echo | $(CXX) -march=native -dM -E -x c++ - 2>/dev/null | grep -o -m 1 __AVX512F__)
  HAS_OPENBLAS := $(if $(NO_OPENBLAS)$(VARIANT)$(HAS_AVX512),,$(call probe,openblas,extern "C" void openblas_set_num_threads(int); int main() { openblas_set_num_threads(1); },-lopenblas))
  # vectors of one width for loops and for copies of structs: a wide load of what two narrow stores wrote stalls.
  # Free kernels choose their own (CPU_WIDE in dev/cpu/engine.h)
  WIDTH := $(if $(call probe,width,int main() { return 0; },-mprefer-vector-width=256),-mprefer-vector-width=256)
  # every program is one file: what it does not use of the trainer that it includes need not be compiled, a quarter of the time
  WHOLE := $(if $(call probe,whole,int main() { return 0; },-fwhole-program),-fwhole-program)
  $(call say,OpenBLAS:  $(if $(HAS_OPENBLAS),yes,no: $(if $(HAS_AVX512),the built-in matrix product is as fast with AVX-512,the built-in matrix product is slower$(if $(NO_OPENBLAS)$(VARIANT),, (apt install libopenblas-dev)))))
  $(call say,MPI:       $(if $(HAS_MPI),yes,no: the NCCL stand-in is not tested$(if $(NO_MPI)$(VARIANT),, (apt install libopenmpi-dev))))
endif
endif

# ---- how to compile. Each device, precision and sanitizer has a directory of its own
lower = $(subst B,b,$(subst F,f,$(subst P,p,$(1))))
BUILD = build/$(DEVICE)-$(call lower,$(PRECISION))$(addprefix -,$(VARIANT))
DEFINES = -DENABLE_$(PRECISION) $(if $(MULTI_GPU),-DMULTI_GPU $(MPI_FLAGS))
WARNINGS = -Wall -Wextra
# -Og takes a third of the time of -O3: for the sanitizers, for tests of the host's code, and in bf16 for those of kernels,
# which run in fp32 as users run them. -g1 is enough for the lines in a report, and a sixth faster than -g
OPTIMIZE_asan = -Og -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
OPTIMIZE_tsan = -Og -g1 -fsanitize=thread
QUICK = $(addprefix $(BUILD)/dev/test/,second_model workbench test_files test_recipes \
    $(if $(filter BF16,$(PRECISION)),test_augment test_dropit test_kernels))
OPTIMIZE = $(or $(OPTIMIZE_$(VARIANT)),$(if $(filter $(QUICK),$@),-Og,-O3) -g1)
# no contraction: a kernel gives the same bits as a vector loop and thread by thread. No strict aliasing: kernels read
# packed data through vector types, as nvcc lets them
CPU_FLAGS = -std=c++17 $(OPTIMIZE) -march=native $(WIDTH) $(WHOLE) -fno-math-errno -fno-trapping-math -ffp-contract=off -fno-strict-aliasing \
    $(WARNINGS) -Wno-unknown-pragmas -pthread -I dev/cpu $(DEFINES) $(if $(HAS_OPENBLAS),-DCPU_OPENBLAS)
CPU_LIBS = -Wl,--as-needed $(if $(HAS_OPENBLAS),-lopenblas) $(if $(MULTI_GPU),$(MPI_FLAGS)) -lm
NVCC_FLAGS = -O3 -std=c++17 -arch=$(ARCH) -lineinfo -Xcompiler -Wall,-Wextra $(if $(WERROR),-Werror all-warnings) $(DEFINES)
NVCC_LIBS = -lcublas -lcublasLt $(if $(MULTI_GPU),-lnccl $(MPI_FLAGS))
COMMAND = $(if $(filter cuda,$(DEVICE)),$(NVCC) $(NVCC_FLAGS) $(NVCC_LIBS),$(CXX) $(CPU_FLAGS) $(CPU_LIBS))

.PHONY: help test asan tsan compare bench dumps data check sync clean FORCE
.SECONDARY:
.DELETE_ON_ERROR:
FORCE:

# ./train_deit is the program that was asked for last: another precision replaces it
$(PROGRAMS): %: $(BUILD)/% FORCE
	@cmp -s $< $@ || cp -f $< $@
	@echo "built ./$@ ($(DEVICE), $(PRECISION))"

# a file that changes when the command does, so that its dependents are built again
$(BUILD)/command: FORCE
	@mkdir -p $(@D); echo '$(COMMAND)' | cmp -s - $@ || echo '$(COMMAND)' > $@

ifeq ($(DEVICE),cuda)
$(BUILD)/%: %.cu $(BUILD)/command
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) $< -o $@ $(NVCC_LIBS)
else
build/cu2cpp: dev/cpu/cu2cpp.cpp
	@mkdir -p build
	$(CXX) -std=c++17 -O2 $(WARNINGS) $< -o $@
$(BUILD)/%.cpp: %.cu build/cu2cpp
	@mkdir -p $(@D)
	build/cu2cpp $(if $(VARIANT),--fibers) $< > $@
$(BUILD)/%: $(BUILD)/%.cpp $(BUILD)/command
	$(CXX) $(CPU_FLAGS) -MMD -MP -MF $@.d $< -o $@ $(CPU_LIBS)
-include $(wildcard $(BUILD)/*.d $(BUILD)/dev/*.d $(BUILD)/dev/test/*.d $(BUILD)/dev/cuda/*.d)
endif
# tests and benchmarks include their trainer
$(foreach t,$(filter test_%,$(PROGRAMS)),$(eval $(BUILD)/$(t) $(BUILD)/$(t).cpp: $(wildcard $(t:test_%=train_%).cu)))
$(BUILD)/dev/bench $(BUILD)/dev/bench.cpp: $(wildcard train_*.cu)
$(BUILD)/dev/test/workbench $(BUILD)/dev/test/workbench.cpp: $(wildcard dev/cuda/*.cu)
$(foreach t,$(DEVICE_TESTS),$(eval $(BUILD)/$(t) $(BUILD)/$(t).cpp: $(wildcard train_*.cu dev/cuda/*.cuh dev/test/*.cuh)))

# the shared sections of a trainer, for a model of the tests: up to the interface; the training; what stands behind
build/shared/%.cuh: train_deit.cu Makefile
	@mkdir -p $(@D)
	awk -v part=$* '/^\/\/ -+ shared: /{ n++; open = 1 } (n < 3 ? "head" : n == 3 ? "training" : "machinery") == part && (open || n == 0) { print } \
	    /^\/\/ -+ end shared: /{ open = 0 }' $< > $@
$(BUILD)/dev/test/second_model $(BUILD)/dev/test/second_model.cpp: $(addprefix build/shared/,head.cuh training.cuh machinery.cuh)

# ---- tests
asan tsan:
	@$(MAKE) --no-print-directory DEVICE=cpu PRECISION=FP32 VARIANT=$@ $(addprefix build/cpu-fp32-$@/,$(PROGRAMS) $(DEVICE_TESTS))
test:
	@dev/test/run.sh

check:
	@dev/test/check_shared.sh
sync:
	@dev/test/check_shared.sh "$(FROM)"
# PEER_PYTHON has PyTorch: any for compare and dumps; today's for bench, whose times are claims
PEER_PYTHON ?= python3
compare: train_deit
	$(PEER_PYTHON) dev/reference/compare.py
bench: train_deit $(BUILD)/dev/bench
	$(PEER_PYTHON) dev/reference/bench_deit_cpu.py --bench $(BUILD)/dev/bench
dumps:
	PYTHON=$(PEER_PYTHON) dev/reference/make_dumps.sh
data:
	python3 data/fashion.py --train 10000 --val 2000 --train-out data/fashion_train.bin --val-out data/fashion_val.bin
clean:
	rm -rf build $(PROGRAMS)
