-- destroy.lua: end one session; its data goes, a tombstone with the moment of its end stays.
--
-- KEYS[1]  the session key, a hash
--
-- ARGV[1]  call id, 8 bytes; the reply echoes it
-- ARGV[2]  digest of the secret: current, former in its grace, or offered; empty: whatever is current
-- ARGV[3]  microseconds since the first sending of this call; 0: this is the first
-- ARGV[4]  grace time, how long the tombstone stays, ms
-- ARGV[5]  '=' and the principal that the session must have; empty: any
-- ARGV[6]  1: leave a tombstone even where there is no session yet
-- ARGV[7]  1: replicas are waited for
--
-- Reply: {code, call id, time in microseconds}, by code
--   destroyed  the session has ended
--   missing    there is no such session, or it is another principal's

local session = KEYS[1]
local call_id = ARGV[1]
local digest = ARGV[2]
local resend = tonumber(ARGV[3])
local grace = tonumber(ARGV[4])
local wanted = ARGV[5]
local always = ARGV[6] == '1'
local waited_for = ARGV[7] == '1'

local IDENTITY, IDENTITY_BYTES = '>Bc32I6I6', 45
local FORMER, FORMER_BYTES = '>c32I7I6B', 46

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now = math.floor(now_us / 1000)

local meta = redis.call('HMGET', session, '@i', '@f', '@p', '@t', '@n')
local identity, formers, principal, ended, pending = meta[1], meta[2] or '', meta[3], meta[4], meta[5]

-- Sent again: the first sending may be what ended it, so a log-out whose reply was lost is one.
if ended then
  if resend == 0 then return {'missing', call_id, now_us} end
  -- WAIT counts replicas that have the last write of its own connection, so there has to be one.
  if waited_for then redis.call('HSET', session, '@t', ended) end
  return {'destroyed', call_id, now_us}
end
if not identity and not always then return {'missing', call_id, now_us} end

if digest ~= '' then
  -- Equality of SHA-256 values tells nothing about secrets by its time.
  local honoured = identity and #identity == IDENTITY_BYTES
    and digest == select(2, struct.unpack(IDENTITY, identity))
    or pending and digest == pending:sub(1, 32)
  for at = 1, #formers - FORMER_BYTES + 1, FORMER_BYTES do
    local former, _, grace_end = struct.unpack(FORMER, formers, at)
    -- A log-out that overlaps a rotation logs out (G8), whenever it was opened.
    honoured = honoured or (former == digest and now < grace_end)
  end
  if not honoured then return {'missing', call_id, now_us} end
end
if wanted ~= '' and (not principal or '=' .. principal ~= wanted) then return {'missing', call_id, now_us} end

-- HSET first: it meets the out-of-memory check before anything is written. Where it is refused, the
-- data goes all the same, and no tombstone can stay.
local tombstone = struct.pack('>I7', now_us)
local reply = redis.pcall('HSET', session, '@t', tombstone)
redis.call('DEL', session)
if type(reply) == 'number' then
  redis.call('HSET', session, '@t', tombstone)
  redis.call('PEXPIRE', session, grace)
end
return {'destroyed', call_id, now_us}
