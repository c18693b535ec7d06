/* What a processor says of itself, less some instruction sets.
 *
 * Loaded before a program (LD_PRELOAD) whose libraries have 0f 04, which is no instruction, in the
 * place of every cpuid: `benchmarks/instruction_sets.py` writes such copies. Bits that
 * LATENTRT_CPUID_MASK names, as "leaf.subleaf.register.bit" with spaces between, are told as 0.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { LENGTH = 2, MOST = 128 };

static struct { unsigned leaf, subleaf, reg, bit; } hidden[MOST];
static int count;

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)registers[REG_RIP];
    (void)number, (void)info;
    if (at[0] != 0x0f || at[1] != 0x04) {
        signal(SIGILL, SIG_DFL);
        return;
    }
    unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], found[4];
    __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
    for (int i = 0; i < count; i++)
        if (hidden[i].leaf == leaf && (leaf != 7 || hidden[i].subleaf == subleaf))
            found[hidden[i].reg] &= ~(1u << hidden[i].bit);
    registers[REG_RAX] = found[0];
    registers[REG_RBX] = found[1];
    registers[REG_RCX] = found[2];
    registers[REG_RDX] = found[3];
    registers[REG_RIP] += LENGTH;
}

__attribute__((constructor)) static void begin(void) {
    const char *mask = getenv("LATENTRT_CPUID_MASK");
    for (int length; mask && count < MOST; count++, mask += length)
        if (sscanf(mask, " %u.%u.%u.%u%n", &hidden[count].leaf, &hidden[count].subleaf,
                   &hidden[count].reg, &hidden[count].bit, &length) != 4)
            break;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, NULL);
}
