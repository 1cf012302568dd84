/* Multiboot entry (GNU Multiboot specification 0.6.96): 32-bit protected mode, flat
 * segments, no paging, interrupts off. They stay off: nothing here needs one. */

.set FLAGS, 3                   /* modules on page boundaries; tell us the memory there is */
.set MAGIC, 0x1BADB002

.section .multiboot, "a"
.align 4
.long MAGIC, FLAGS, -(MAGIC + FLAGS)

.section .text
.global _start
_start:
    mov $stack_end, %esp
    cld
    push %ebx                   /* the multiboot information */
    call bare_main

.section .bss
.align 16
.skip 16384
stack_end:

.section .note.GNU-stack, "", @progbits
